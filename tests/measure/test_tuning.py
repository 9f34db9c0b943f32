"""Tuning measures what it says, chooses by it, and keeps the present section unless another is shown to be better."""

import copy
import itertools
import json

import numpy as np
import pytest
import tiny
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture, prompt_of
from demo_model import demo_model

import reccomp_hf
from reccomp_hf.demo import VALIDATION_SEEDS
from reccomp_hf.measure.evaluation import Sample, demo_samples, parse_setting
from reccomp_hf.measure.tuning import Goal, jensen_shannon, running, tune
from reccomp_hf.measure.tuning.candidates import FEW, LISTS, budget_ladder, candidate_settings
from reccomp_hf.measure.tuning.kinds import beginning
from reccomp_hf.measure.tuning.measuring import measure
from reccomp_hf.measure.tuning.result import section_of


def samples_of(count):
    """Questions of different lengths on four small pictures."""
    questions, pictures = [*tiny.SENTENCES[:3], "How many dogs are there?", "Why?"], tiny.pictures(4)
    return [Sample(pictures[row % 4], f"picture {row % 4}", questions[row % 5], ()) for row in range(count)]


def validation_samples(count):
    return demo_samples(count, seeds=VALIDATION_SEEDS)


# ---- what is measured ----------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    first, second = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    first[0, 2], second[1, 3] = -torch.inf, -torch.inf  # tokens that are ruled out
    for row, value in enumerate(jensen_shannon(first, second)):
        p, q = (logits[row].double().softmax(-1).tolist() for logits in (first, second))
        expected = 0.0
        for one, other in zip(p, q, strict=True):
            middle = (one + other) / 2
            expected += sum(part / 2 * np.log2(part / middle) for part in (one, other) if part > 0)
        assert value.item() == pytest.approx(expected, abs=1e-6)
    apart = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert jensen_shannon(apart[0], apart[1]).item() == pytest.approx(1)
    assert jensen_shannon(first, first).abs().max() < 1e-6


@torch.no_grad()
def by_hand(architecture, sample, fields, new_tokens):
    """A measurement step by step: a forward pass for every token, one row, no cache, no encoded images."""
    model, processor = architecture.compressed(), architecture.processor()
    inputs = dict(processor(images=[sample.open()], text=[prompt_of(sample.question, 1)], return_tensors="pt"))
    divergences, agrees = [], True
    for _ in range(new_tokens):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        full = model(**inputs, token_recovery={"enabled": False}).logits[0, -1]
        ours = model(**inputs, token_recovery=fields)
        divergences.append(jensen_shannon(full, ours.logits[0, -1]).item())
        agrees &= bool(full.argmax() == ours.logits[0, -1].argmax())
        inputs["input_ids"] = torch.cat([inputs["input_ids"], full.argmax().view(1, 1)], 1)
        if full.argmax() == model.generation_config.eos_token_id:
            break
    return np.mean(divergences), agrees, int((ours.visual_token_counts + ours.newline_counts).sum())


@each_architecture
def test_a_batch_measures_what_single_steps_measure(architecture):
    settings = {
        "fixed": {"budget": 0.2, "position_ids": "original"},
        "dynamic": {},
        "all": {"budget": 1.0, "merged_tokens": 0},
        "words": {"method": "mmtok", "budget": 0.2},
    }
    samples, model = samples_of(5), architecture.compressed()
    found = measure(model, architecture.processor(), samples, settings, 4)
    for (name, fields), row in itertools.product(settings.items(), range(len(samples))):
        one = found[name][row]
        divergence, agrees, tokens = by_hand(architecture, samples[row], fields, 4)
        assert one.divergence == pytest.approx(divergence, abs=2e-5)
        assert (one.agrees, one.tokens) == (agrees, tokens)
    assert max(one.divergence for one in found["all"]) < 1e-5 and all(one.agrees for one in found["all"])
    assert min(one.divergence for one in found["fixed"]) > 2e-5


def test_the_vision_tower_runs_once_for_all_settings():
    model, processor = demo_model()
    layer, calls = model.model.vision_tower, []
    block = getattr(layer, "vision_model", layer).encoder.layers[0]
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    settings = {name: parse_setting(f"{name}:9").fields for name in ("balanced", "paper", "visual", "cdpruner")}
    measure(model, processor, validation_samples(4), settings, 2)
    hook.remove()
    assert len(calls) == 2  # the other one is the uncompressed model's own


# ---- candidates ----------------------------------------------------------------------------------------------------


def test_candidates_are_valid_and_differ():
    model, _ = demo_model()
    for names in LISTS.values():
        found = candidate_settings(model, names, 9, {}, strict=True)
        assert len(found) == len(names)
        sections = [json.dumps(model.config.token_recovery.replace(one.fields).to_dict()) for one in found.values()]
        assert len(set(sections)) == len(names)
    assert set(FEW) < set(LISTS["many"]) and 8 <= len(FEW) <= 10 and "mmtok" in LISTS["many"]


def test_without_a_text_encoder_the_settings_that_read_the_question_are_left_out(tmp_path):
    tiny.save_stock(tmp_path)
    model = LLAVA.model_class.from_pretrained(tmp_path).eval()
    found = candidate_settings(model, LISTS["many"], 9, {}, strict=False)
    assert {"divprune:9", "scope:9"} <= set(found) and not {"balanced:9", "cdpruner:9", "trim:9"} & set(found)
    with pytest.raises(ValueError, match="reads the question, and this checkpoint has no text encoder"):
        candidate_settings(model, ["balanced"], 9, {}, strict=True)
    tuning = tune(model, LLAVA.processor(), samples_of(8), budget=9, max_new_tokens=2)
    assert tuning.section["budget"] == 9


def test_the_ladder_is_in_tokens_or_in_shares():
    assert budget_ladder(demo_model()[0].config) == (4, 7, 10, 14, 22, 36, 72)
    assert budget_ladder(LLAVA_NEXT.compressed().config) == (0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5)


# ---- runs ----------------------------------------------------------------------------------------------------------

CANDIDATES = ["balanced", "divprune", "coverage+coverage_by=content"]


def run(samples=None, **options):
    settings = {"budget": 14, "candidates": CANDIDATES, "batch_size": 8, "max_new_tokens": 3, **options}
    return tune(*demo_model(), validation_samples(32) if samples is None else samples, **settings)


def test_a_bad_section_is_replaced_and_a_good_one_is_kept():
    model, processor = demo_model()
    samples = validation_samples(96)
    bad = {"method": "random", "budget": 14, "position_ids": "compact"}
    folder = reccomp_hf.demo.checkpoint_folder("demo")
    model = type(model).from_pretrained(folder, token_recovery=bad, dtype=torch.float32).eval()
    tuning = tune(model, processor, samples, candidates=CANDIDATES, max_new_tokens=3)
    assert tuning.changed and tuning.chosen == "one for all"
    assert {**tuning.section, **parse_setting("balanced:14").fields} == tuning.section
    assert tuning.contenders["one for all"].difference.high < 0
    assert tuning.chosen_on + tuning.reported_on == 96
    assert model.config.token_recovery.method == "random"  # the model is not changed
    kept = run()
    assert not kept.changed and kept.chosen == "present section" and kept.section["budget"] == 14
    assert "'present section' is kept" in kept.reason


def test_questions_of_an_image_are_on_one_side():
    samples = validation_samples(60)
    choosing, reporting = running._split(samples, 0)
    assert not {sample.picture for sample in choosing} & {sample.picture for sample in reporting}
    assert len(choosing) + len(reporting) == 60 and min(len(choosing), len(reporting)) > 20
    assert running._split(samples, 1)[0] != choosing


def test_two_runs_are_equal_and_a_killed_one_resumes(tmp_path, monkeypatch):
    whole = tmp_path / "whole.json"
    run(output=whole)
    output, calls = tmp_path / "out.json", []

    def killed_after(most):
        def measured(*arguments):
            if len(calls) >= most:
                raise KeyboardInterrupt
            calls.append(1)
            return measure(*arguments)

        return measured

    for most in (1, 1, 3):  # the second is killed before it measures anything
        monkeypatch.setattr(running, "measure", killed_after(most))
        with pytest.raises(KeyboardInterrupt):
            run(output=output)
        assert not output.exists() and len(list(tmp_path.glob("out.json.parts/part-*"))) >= 1
    monkeypatch.setattr(running, "measure", killed_after(100))
    run(output=output)
    batches = len(calls)
    assert output.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.json.parts").exists()
    calls.clear()
    run()
    assert len(calls) == batches  # a batch was measured once
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(output=output)


@pytest.mark.parametrize(
    "options", [{"budget": 13}, {"candidates": CANDIDATES[:2]}, {"samples": 33}, {"max_new_tokens": 2}, {"seed": 1}]
)
def test_a_run_with_other_arguments_does_not_resume(tmp_path, monkeypatch, options):
    def killed(*_):
        raise KeyboardInterrupt

    output = tmp_path / "out.json"
    with monkeypatch.context() as patch:
        count = itertools.count()
        patch.setattr(running, "measure", lambda *arguments: measure(*arguments) if next(count) < 1 else killed())
        with pytest.raises(KeyboardInterrupt):
            run(output=output)
    if "samples" in options:
        options = {"samples": validation_samples(33)}
    with pytest.raises(ValueError, match="holds answers of another run, which differs in"):
        run(output=output, **options)


def test_halving_measures_less_and_keeps_the_best(monkeypatch):
    names = ["random", *CANDIDATES, "visual", "pool", "hiprune", "scope", "holov", "fastervlm"]
    monkeypatch.setitem(running.LISTS, "many", tuple(names))
    monkeypatch.setattr(running, "_LEAST_SURVIVORS", 2)
    seen = []

    def counted(*arguments):
        seen.append(set(arguments[3]))
        return measure(*arguments)

    monkeypatch.setattr(running, "measure", counted)
    tuning = run(validation_samples(64), candidates="many", batch_size=8)
    sizes = [len(settings) for settings in seen if "present section" not in settings]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 10 and sizes[-1] == 3
    assert "balanced:14" in tuning.scores.names and "random:14" not in tuning.scores.names


def test_the_fewest_tokens_for_an_agreement():
    tuning = run(validation_samples(32), budget=None, agreement=0.9)
    taken = tuning.contenders[tuning.chosen]
    assert taken.agreement.high >= 0.9
    fewer = [one for one in tuning.contenders.values() if one.tokens < taken.tokens]
    assert all(one.agreement.high < 0.9 for one in fewer)


def test_an_agreement_that_none_reaches_is_said(monkeypatch):
    monkeypatch.setattr("reccomp_hf.measure.tuning.goal.budget_ladder", lambda config: (1, 2))
    samples = validation_samples(64)
    tuning = run(samples, budget=None, agreement=1.0, candidates=["random"], max_new_tokens=1)
    assert tuning.reason.startswith("No contender keeps 1 of the answers") and not tuning.changed


def test_a_dynamic_count_has_the_mean_that_was_asked():
    tuning = run(validation_samples(48), budget=None, average=20, dynamic=True)
    found = tuning.contenders["dynamic count"]
    assert tuning.section["budget"] is None and tuning.section["outlier_threshold"] > 1.5
    assert found.tokens == pytest.approx(20, rel=0.2) and found.spread[0] < 18 < 22 < found.spread[1]
    with pytest.raises(ValueError, match="average must be between"):
        run(budget=None, average=143, dynamic=True)


def test_a_frontier_chooses_nothing():
    tuning = run(budget=None, frontier=True, candidates=CANDIDATES[:2])
    assert tuning.section is None and "token_recovery" not in json.loads(tuning.to_json())
    names = [f"one for all, budget {budget}" for budget in budget_ladder(demo_model()[0].config)]
    assert list(tuning.contenders) == ["present section", *names]


def test_llava_next_is_tuned_in_shares():
    model, processor = LLAVA_NEXT.compressed(), LLAVA_NEXT.processor()
    options = {"max_new_tokens": 2, "batch_size": 4}
    tuning = tune(model, processor, samples_of(8), agreement=0.5, candidates=CANDIDATES, **options)
    assert tuning.section["budget"] is None or isinstance(tuning.section["budget"], float)
    tuning = tune(model, processor, samples_of(8), average=0.3, dynamic=True, **options)
    assert tuning.section["budget"] is None


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 14, "agreement": 0.9}, "one goal, got budget and agreement"),
        ({"budget": 0}, "budget must be an int >= 1 or a float in"),
        ({"budget": 1.5}, "budget must be"),
        ({"budget": True}, "budget must be"),
        ({"average": float("nan"), "by_question": True}, "average must be"),
        ({"agreement": 0}, "agreement must be a share"),
        ({"agreement": 95}, "agreement must be a share"),
        ({"dynamic": True}, "needs average"),
        ({"dynamic": True, "average": 9, "by_question": True}, "needs average"),
        ({"frontier": True, "budget": 9}, "one goal"),
    ],
)
def test_goals_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        Goal(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": "several"}, "candidates must be 'few', 'many' or names of settings, got 'several'"),
        ({"candidates": []}, "candidates must be"),
        ({"candidates": ["blanced"]}, "did you mean 'balanced'"),
        ({"candidates": ["balanced:16"]}, "must not have a budget of its own"),
        ({"candidates": ["off"]}, "off"),
        ({"candidates": ["stored"]}, "chooses no tokens of its own"),
        ({"candidates": ["authors"]}, "budget"),
        ({"shared": {"position": 1}}, "Unknown token_recovery field"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"samples": validation_samples(12)}, "images or more"),
    ],
)
def test_arguments_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_section_by_question_reads_what_was_measured():
    """The written rules give every question the setting that tuning measured for it."""
    model, processor = demo_model()
    tuning = run(validation_samples(64), budget=None, average=14, by_question=True)
    plan = tuning.contenders["by question"].plan
    assert plan.groups and tuning.contenders["by question"].tokens <= 15
    settings = {
        name: one.fields
        for budget in (*budget_ladder(model.config), 14)
        for name, one in candidate_settings(model, CANDIDATES, budget, {}, strict=True).items()
    }
    section = section_of(plan, settings)
    samples, processor = validation_samples(12), copy.copy(processor)
    processor.recovery_rules = section["rules"]
    measured = measure(model, processor, samples, {"rules": section, **{n: settings[n] for n in plan.settings}}, 2)
    for row, sample in enumerate(samples):
        expected = measured[plan.setting(beginning(sample.question))][row]
        assert measured["rules"][row].tokens == expected.tokens
        assert measured["rules"][row].divergence == pytest.approx(expected.divergence, abs=1e-5)
