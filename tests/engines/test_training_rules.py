"""Training under rules by question: every trainer passes the rule of each row on to the model."""

import copy
import tempfile

import pytest
import torch
from architectures import LLAVA
from datasets import Dataset
from demo_model import demo_model
from training import Rows, arguments, collator, watched
from transformers import AutoModelForImageTextToText, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from reccomp_hf import CompressedTrainerMixin
from reccomp_hf.core.rules import find_rule
from reccomp_hf.demo import checkpoint_folder, draw_scene, questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore"),  # TRL's notes on its own features
]
RULES = [{"begins": "what color", "budget": 24}, {"begins": ["is there", "how many"], "budget": 7}]
BUDGETS = {0: 24, 1: 7, -1: 12}
SEEDS = range(7, 10)


def budget_of(question):
    return BUDGETS[find_rule(RULES, question)]


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_a_batch_of_different_rules_is_trained_on(cls):
    rows, processor = Rows(3), LLAVA.processor()
    model = LLAVA.build(budget=12, rules=RULES)
    processor.recovery_rules = RULES
    settings = {"max_steps": 1, "per_device_train_batch_size": 3}
    if cls is Trainer:
        run = Trainer(model, arguments(**settings), data_collator=collator(processor), train_dataset=rows)
    else:
        settings |= {"completion_only_loss": True}
        run = SFTTrainer(
            model, arguments(SFTConfig, **settings), train_dataset=rows.dataset(), processing_class=processor
        )
    with watched(model) as seen:
        run.train()
    assert sorted(budget_of(row["prompt"][0]["content"]) for row in rows) == [7, 12, 12]
    assert sorted(seen.projected) == [7, 24]  # the rows without a rule together


def options(cls, **given):
    common = {"output_dir": tempfile.mkdtemp(), "max_steps": 1, "per_device_train_batch_size": 3, "bf16": False}
    common |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "gradient_checkpointing": False}
    return cls(**{**common, "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 1e-6, **given})


def turn(role, text):
    return [{"role": role, "content": text}]


def rows_of(kind):
    found = []
    for seed in SEEDS:
        scene = draw_scene(seed)
        asked = questions(scene, seed)[(0, 2, 1)[seed % 3]]
        row = {"images": [scene.image], "prompt": turn("user", asked.text)}
        if kind == "pairs":
            row |= {"chosen": turn("assistant", asked.answer), "rejected": turn("assistant", "three blue rings")}
        elif kind == "labels":
            row |= {"completion": turn("assistant", asked.answer), "label": seed % 2 == 1}
        found.append(row)
    return Dataset.from_list(found)


def demo_with_rules():
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_folder("demo"), dtype=torch.float32)
    model.config.token_recovery = {"budget": 12, "rules": RULES}
    processor = copy.deepcopy(demo_model()[1])
    processor.recovery_rules = RULES
    return model, processor


@pytest.mark.parametrize(
    ("cls", "config", "kind"),
    [(DPOTrainer, DPOConfig, "pairs"), (KTOTrainer, KTOConfig, "labels")],
    ids=["dpo", "kto"],
)
def test_preferences_are_read_under_the_rules(cls, config, kind):
    model, processor = demo_with_rules()
    data, reference = rows_of(kind), demo_with_rules()[0]
    run = cls(model, reference, options(config, max_length=None), train_dataset=data, processing_class=processor)
    with watched(model) as seen:
        run.train()
    budgets = [budget_of(row["prompt"][0]["content"]) for row in data]
    assert len(set(budgets)) == 3
    forward = sorted(budgets if kind == "labels" else [2 * budget for budget in budgets])
    assert len(seen.projected) >= 3 and sorted(seen.projected[:3]) == forward


@pytest.mark.parametrize(
    ("base", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["grpo", "rloo"]
)
def test_answers_are_sampled_and_scored_under_the_same_rules(base, config):
    class Compressed(CompressedTrainerMixin, base):
        """As the guide shows."""

    torch.manual_seed(0)
    model, processor = demo_with_rules()
    data, read = rows_of("prompts"), []
    settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0, "per_device_train_batch_size": 6}

    def see(module, args, kwargs):
        if (length := kwargs["inputs_embeds"].shape[1]) > 1:
            read.append(length)

    model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    run = Compressed(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(n % 2) for n in range(len(completions))],
        args=options(config, **settings),
        train_dataset=data,
        processing_class=processor,
    )
    with watched(model) as seen:
        run.train()
    budgets = [budget_of(row["prompt"][0]["content"]) for row in data]
    wanted = sorted(2 * budget for budget in budgets)
    assert len(read) >= 2
    for start in range(0, len(seen.projected), 3):
        assert sorted(seen.projected[start : start + 3]) == wanted
