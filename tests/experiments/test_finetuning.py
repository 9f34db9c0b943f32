"""The fine-tuning experiment: what is trained on, what is compared, and what is told."""

import copy

import numpy as np
import pytest
import torch
from demo_model import demo_model

from reccomp_hf.demo import EVALUATION_SEEDS, TRAIN_SEEDS, draw_scene, questions
from reccomp_hf.experiments.finetuning import (
    COMPRESSED,
    DEFAULT_SETTING,
    UNCOMPRESSED,
    UNTRAINED,
    Recipe,
    SceneQuestions,
    finetune,
    train_lora,
)
from reccomp_hf.measure.evaluation.samples import demo_samples
from reccomp_hf.measure.evaluation.settings import parse_setting

# PEFT 0.21 asks for an attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RECIPE = Recipe(steps=2, batch_size=3, bf16=False)


@pytest.fixture(scope="module")
def report():
    model, processor = demo_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    section = model.config.token_recovery
    found = finetune(
        model, processor, parse_setting(DEFAULT_SETTING), demo_samples(12), RECIPE, [0, 2], progress=False
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.token_recovery == section
    return found


def test_rows_are_questions_of_their_scenes():
    rows, kinds = SceneQuestions(range(200, 240)), set()
    assert len(rows) == len(list(rows)) == 40
    for seed, row in zip(range(200, 240), rows, strict=True):
        asked = {question.text: question for question in questions(draw_scene(seed), seed)}
        question = asked[row["prompt"][0]["content"]]
        assert row["completion"] == [{"role": "assistant", "content": question.answer}]
        assert np.array_equal(row["images"][0], draw_scene(seed).image)
        kinds.add(question.kind)
    assert kinds == {"color", "shape", "exist", "count", "read"}
    assert not {*TRAIN_SEEDS[-1000:]} & {*EVALUATION_SEEDS[:1000]}


def test_runs(report):
    ways = [f"{way}, seed {seed}" for seed in (0, 2) for way in (COMPRESSED, UNCOMPRESSED)]
    assert {*report.answers.results} == {name + end for name in (UNTRAINED, *ways) for end in ("", ", off")}
    assert [*report.seconds] == ways
    for name, result in report.answers.results.items():
        assert {*result.tokens.tolist()} == {144 if name.endswith(", off") else 14}
        assert len(result.answers) == 12


def test_the_table_has_mean_and_spread(report):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown().splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        [way, asked] for asked in ("the budget", "all tokens") for way in (UNTRAINED, COMPRESSED, UNCOMPRESSED)
    ]
    values = report.accuracies(COMPRESSED)
    assert lines[3][-2] == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"
    assert lines[2][-2] == f"{report.accuracies(UNTRAINED)[0]:.3f}"
    pairs = {(row["setting"], row["minus"]) for row in report.to_dict()["differences"]}
    assert (f"{COMPRESSED}, seed 2", f"{UNCOMPRESSED}, seed 2") in pairs
    assert (f"{COMPRESSED}, seed 0", UNTRAINED) in pairs


def test_training_follows_the_config_and_the_seed():
    model, processor = demo_model()
    weights, rows = {}, SceneQuestions(range(100, 106))
    for name, enabled, seed in (("first", True, 0), ("again", True, 0), ("other", True, 1), ("off", False, 0)):
        learner = copy.deepcopy(model)
        learner.config.token_recovery = learner.config.token_recovery.replace({"enabled": enabled})
        projected = []
        learner.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args, seen=projected: seen.append(args[0].shape[:-1].numel())
        )
        adapted = train_lora(learner, processor, rows, RECIPE, seed)
        weights[name] = torch.cat([value.flatten() for key, value in adapted.named_parameters() if "lora_B" in key])
        assert projected == [3 * (16 if enabled else 144)] * 2
        assert weights[name].any()
    assert torch.equal(weights["first"], weights["again"])
    assert not torch.equal(weights["first"], weights["other"])
    assert not torch.equal(weights["first"], weights["off"])


def test_too_few_scenes():
    model, processor = demo_model()
    with pytest.raises(ValueError, match=r"at most 1000000 training scenes; 40000 steps of 32 for the seeds \[0\]"):
        finetune(model, processor, parse_setting(DEFAULT_SETTING), demo_samples(6), Recipe(steps=40_000), [0])
