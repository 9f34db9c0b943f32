"""Faults of tuning that nobody would see: mixed runs, broken numbers, names of other settings."""

import copy

import pytest
import tiny
import torch
from architectures import LLAVA, LLAVA_NEXT
from demo_model import demo_model

import reccomp_hf
from reccomp_hf.data.parts import Parts
from reccomp_hf.demo import VALIDATION_SEEDS, checkpoint_folder
from reccomp_hf.measure.evaluation import Sample, demo_samples
from reccomp_hf.measure.tuning import running, tune
from reccomp_hf.measure.tuning.measuring import measure

CANDIDATES = ["balanced", "divprune"]
FAST = {"candidates": CANDIDATES, "batch_size": 8, "max_new_tokens": 2}


def validation_samples(count):
    return demo_samples(count, seeds=VALIDATION_SEEDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": {"budget": 7}}, "budget is what tuning chooses"),
        ({"shared": {"rules": []}}, "rules is what tuning chooses"),
        ({"shared": {"method": "divprune"}}, "method is what tuning chooses"),
        ({"candidates": ["divprune+position_ids=compact"]}, "sets position_ids, which all candidates share"),
        (
            {"candidates": ["balanced", "balanced+newlines=none"], "by_question": True},
            "'balanced:14' and 'balanced.newlines=none:14'|differ in newlines, which rules by question cannot change",
        ),
    ],
)
def test_candidates_that_would_not_be_what_their_names_say(options, message):
    with pytest.raises(ValueError, match=message):
        tune(*demo_model(), validation_samples(32), budget=14, **{**FAST, **options})


def test_logits_that_are_not_numbers_are_not_the_best():
    folder = checkpoint_folder("demo")
    model, processor = demo_model()
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        tune(model, processor, validation_samples(24), budget=14, **FAST)


def test_a_checkpoint_with_rules_is_tuned():
    """Its present section is measured with its rules, and the candidates without them."""
    folder = checkpoint_folder("demo")
    model, processor = demo_model()
    rules = [{"begins": ["how many"], "budget": 72}, {"begins": "what", "method": "divprune", "budget": 14}]
    section = {**model.config.token_recovery.overridable(), "budget": 14, "rules": rules}
    model = type(model).from_pretrained(folder, token_recovery=section, dtype=torch.float32).eval()
    processor, samples = copy.copy(processor), validation_samples(48)
    processor.recovery_rules = rules
    tuning = tune(model, processor, samples, **FAST)
    _, reporting = running._split(samples, 0)
    counts = sum(sample.question.startswith("How many") for sample in reporting)
    assert 0 < counts < len(reporting)
    present = tuning.contenders["present section"]
    assert present.tokens == pytest.approx(14 + (72 - 14) * counts / len(reporting))
    assert tuning.contenders["one for all"].tokens == 14
    if not tuning.changed:
        assert tuning.section["rules"] == rules
    assert not tune(model, processor, samples, budget=10, **FAST).section.get("rules")


def test_two_runs_that_begin_in_one_folder_are_not_mixed(tmp_path, monkeypatch):
    """Another run replaces the fingerprint before the first one has written a batch; neither reads the other's."""
    output, runs = tmp_path / "out.json", []

    def measured(*arguments):
        if not runs:
            runs.append(arguments)
            with pytest.raises(KeyboardInterrupt):
                tune(*demo_model(), samples, budget=36, output=output, **FAST)
        if len(runs) == 1:
            runs.append(arguments)
            raise KeyboardInterrupt  # the second run is killed
        runs.append(arguments)
        if len(runs) > 4:
            raise KeyboardInterrupt  # and the first one too, after two batches
        return measure(*arguments)

    samples = validation_samples(48)
    with monkeypatch.context() as patch:
        patch.setattr(running, "measure", measured)
        with pytest.raises(KeyboardInterrupt):
            tune(*demo_model(), samples, budget=14, output=output, **FAST)
    assert len(Parts(output).lines()) == 2  # of the first run, under the fingerprint of the second
    resumed = tune(*demo_model(), samples, budget=36, output=output, **FAST)
    assert resumed.to_json() == tune(*demo_model(), samples, budget=36, **FAST).to_json()


@pytest.mark.parametrize("same", [True, False])
def test_an_output_that_another_run_finished_meanwhile(tmp_path, monkeypatch, same):
    output, samples, begun = tmp_path / "out.json", validation_samples(32), []
    other = tune(*demo_model(), samples, budget=14 if same else 36, **FAST).to_json()

    def measured(*arguments):
        if not begun:
            begun.append(1)
            Parts(output).finish([other])
        return measure(*arguments)

    monkeypatch.setattr(running, "measure", measured)
    if same:
        assert tune(*demo_model(), samples, budget=14, output=output, **FAST).to_json() == other
    else:
        with pytest.raises(FileExistsError, match="was written by another run meanwhile"):
            tune(*demo_model(), samples, budget=14, output=output, **FAST)
    assert output.read_text() == other
    assert not Parts(output).folder.exists()


def test_a_changed_image_is_another_run(tmp_path, monkeypatch):
    pictures = tiny.pictures(6)
    samples = [Sample(picture, f"{row}.png", "How many?", ()) for row, picture in enumerate(pictures)]
    options = {"budget": 9, "candidates": ["divprune"], "batch_size": 2, "max_new_tokens": 2}
    model, processor, calls = LLAVA.compressed(), LLAVA.processor(), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(model, processor, samples, output=tmp_path / "out.json", **options)
    pictures[3].putpixel((0, 0), (1, 2, 3))
    with pytest.raises(ValueError, match="differs in questions"):
        tune(model, processor, samples, output=tmp_path / "out.json", **options)


def test_a_section_of_another_model(tmp_path):
    """Shares and rules hold for LLaVA-NeXT; without a text encoder a method that needs the question is refused."""
    rules = [{"begins": ["how many"], "budget": 0.5}]
    section = reccomp_hf.TokenRecoveryConfig(budget=0.2, position_ids="original", rules=rules).overridable()
    next_model, processor = LLAVA_NEXT.compressed(), LLAVA_NEXT.processor()
    processor.recovery_rules = rules
    samples = [Sample(picture, str(row), "How many?", ()) for row, picture in enumerate(tiny.pictures(2))]
    found = measure(next_model, processor, samples, {"rules": section, "half": {**section, "rules": []}}, 2)
    assert all(more.tokens > less.tokens for more, less in zip(found["rules"], found["half"], strict=True))
    tiny.save_stock(tmp_path)
    blind = LLAVA.model_class.from_pretrained(tmp_path).eval()
    processor = LLAVA.processor()
    processor.recovery_rules = rules
    assert [row.tokens for row in measure(blind, processor, samples, {"rules": section}, 2)["rules"]] == [50, 50]
    section = reccomp_hf.TokenRecoveryConfig(method="trim", budget=0.2).overridable()
    with pytest.raises(ValueError, match=r"visual-only|text encoder|question"):
        measure(blind, processor, samples, {"trim": section}, 2)
