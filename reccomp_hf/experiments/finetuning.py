"""Fine-tuning with compression in the loop: LoRA on few tokens, against the same steps on all of them.

`python -m reccomp_hf.experiments.finetuning demo` trains on the demo's scenes and prints the table. It needs `trl`,
whose collator prepares the batches; the training loop is transformers' own `Trainer`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from ..data.progress import progress_bar
from ..demo import TRAIN_SEEDS
from ..demo.training_rows import SceneQuestions
from ..measure.evaluation.report import MEAN, EvaluationReport, SettingResult
from ..measure.evaluation.running import evaluate
from ..measure.evaluation.samples import Sample, demo_samples
from ..measure.evaluation.settings import OFF, Setting, parse_setting
from ..measure.tables import markdown_table

DEFAULT_SETTING = (
    "paper:0.1+text_relevance=value+visual_layer=-2+coverage_share=0.5+merged_tokens=0+position_ids=original"
)
UNTRAINED, COMPRESSED, UNCOMPRESSED = "untrained", "trained compressed", "trained uncompressed"
WAYS = (COMPRESSED, UNCOMPRESSED)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Recipe of LoRA training: AdamW, a warm-up of a tenth of the steps, then a cosine to 0.

    Attributes:
        steps: Optimizer steps.
        batch_size: Questions per step.
        learning_rate: Highest learning rate.
        rank: Rank of the LoRA matrices; `alpha` is twice that.
        bf16: Train under bfloat16 autocast.
    """

    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 1e-3
    rank: int = 16
    bf16: bool = True


def train_lora(model: Any, processor: Any, rows: torch.utils.data.Dataset[Any], recipe: Recipe, seed: int) -> Any:
    """Train adapters for the projector and the language model; the answers alone are learned.

    Args:
        model: A compressed LLaVA, which compresses according to its config (or not, with `enabled` false). It is
            wrapped in place.
        processor: The model's processor.
        rows: Training data, see [`SceneQuestions`].
        recipe: Lengths and rates.
        seed: Seed of the adapters' initial weights and of the order of the rows.

    Returns:
        The adapted model (`peft.PeftModel`) in eval mode.

    Raises:
        ImportError: `trl` is not installed.
    """
    from transformers import Trainer, TrainingArguments

    try:
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
    except ImportError as error:
        raise ImportError("TRL prepares the batches: pip install 'reccomp_hf[train]'.") from error
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules="all-linear",
        exclude_modules=r".*vision_tower.*",  # training it would change the choice of tokens
    )
    adapted = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.steps // 10,
            bf16=recipe.bf16,
            seed=seed,
            label_names=["labels"],
            remove_unused_columns=False,  # the collator reads images and messages
            dataloader_pin_memory=model.device.type == "cuda",
            use_cpu=model.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        Trainer(adapted, arguments, data_collator=collator, train_dataset=rows).train()
    return adapted.eval()


@dataclasses.dataclass
class FinetuningReport:
    """Answers to the same held-out questions before and after training.

    Attributes:
        answers: Answers of all runs; a run is "untrained", or one of the two ways to train and a seed. Each is asked
            at the budget, and with every token (named "..., off").
        seeds: Seeds of the trainings.
        ways: Ways of training, from `WAYS`.
        seconds: Seconds of each training.
    """

    answers: EvaluationReport
    seeds: list[int]
    ways: list[str]
    seconds: dict[str, float]

    def accuracies(self, way: str, kind: str = MEAN, suffix: str = "") -> list[float]:
        """Accuracy of every seed."""
        names = [f"{way}, seed {seed}{suffix}" for seed in self.seeds] if way != UNTRAINED else [UNTRAINED + suffix]
        return [self.answers.accuracy(name, kind).value for name in names]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        pairs = [(f"{way}, seed {seed}", UNTRAINED) for way in self.ways for seed in self.seeds]
        if len(self.ways) > 1:
            pairs += [(f"{COMPRESSED}, seed {seed}", f"{UNCOMPRESSED}, seed {seed}") for seed in self.seeds]
        return {"seeds": self.seeds, "seconds": self.seconds, **self.answers.to_dict(pairs)}

    def markdown(self) -> str:
        """A row for each way to train, asked at the budget and with every token: mean and spread over the seeds."""
        kinds = [*self.answers.kind_names, MEAN]
        rows = [["model", "asked with", *kinds, f"{MEAN} by seed"]]
        for suffix in ("", f", {OFF}"):
            for way in (UNTRAINED, *self.ways):
                cells = [_spread(self.accuracies(way, kind, suffix)) for kind in kinds]
                by_seed = ", ".join(f"{value:.3f}" for value in self.accuracies(way, MEAN, suffix))
                rows.append([way, "all tokens" if suffix else "the budget", *cells, by_seed])
        return "\n".join(markdown_table(rows))


def finetune(
    model: Any,
    processor: Any,
    setting: Setting,
    samples: Sequence[Sample],
    recipe: Recipe,
    seeds: Iterable[int] = (0, 1, 2),
    *,
    ways: Sequence[str] = WAYS,
    progress: bool | None = None,
) -> FinetuningReport:
    """Train a model for every seed, with and without compression, and ask it held-out questions.

    Both trainings of a seed see the same questions in the same order and start from the same adapters.

    Args:
        model: A compressed LLaVA, in eval mode; it is copied, not changed.
        processor: The model's processor.
        setting: The setting of compression, see `parse_setting`.
        samples: Questions and answers, see `demo_samples`.
        recipe: Lengths and rates of the training.
        seeds: Seeds; each trains every way once, on scenes of its own.
        ways: Ways of training, from `WAYS`; the first is compared with the second.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Raises:
        ImportError: `trl` is not installed.
        ValueError: There are too few training scenes for the steps, or the setting is not valid.
    """
    seeds, number = list(seeds), recipe.steps * recipe.batch_size
    if recipe.steps < 1 or (max(seeds) + 1) * number > len(TRAIN_SEEDS):
        raise ValueError(
            f"There must be steps >= 1 and at most {len(TRAIN_SEEDS)} training scenes; {recipe.steps} steps of "
            f"{recipe.batch_size} for the seeds {seeds} need {(max(seeds) + 1) * number}."
        )
    seconds: dict[str, float] = {}
    report = _ask(model, processor, setting, samples, UNTRAINED)
    trainings = [(way, seed) for seed in seeds for way in ways]
    with progress_bar(len(trainings), "trainings", progress) as bar:
        for way, seed in trainings:
            name = f"{way}, seed {seed}"
            learner = copy.deepcopy(model)
            learner.config.token_recovery = learner.config.token_recovery.replace(
                {"enabled": False} if way == UNCOMPRESSED else setting.fields
            )
            last = TRAIN_SEEDS.stop - seed * number  # the demo models were trained on the first ones
            began = time.perf_counter()
            adapted = train_lora(learner, processor, SceneQuestions(range(last - number, last)), recipe, seed)
            seconds[name] = time.perf_counter() - began
            report.results |= _ask(adapted.merge_and_unload(), processor, setting, samples, name).results
            bar.update()
    return FinetuningReport(report, seeds, list(ways), seconds)


def _ask(model: Any, processor: Any, setting: Setting, samples: Sequence[Sample], name: str) -> EvaluationReport:
    """Answers at the setting and with every token, under a run's name."""
    report = evaluate(model, processor, samples, [setting], max_new_tokens=4, progress=False)
    named: dict[str, SettingResult] = {
        f"{name}, {OFF}" if key == OFF else name: result for key, result in report.results.items()
    }
    report.results, report.reference = named, f"{name}, {OFF}"
    return report


def _spread(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation of several."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({np.std(values, ddof=1):.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, ask and print the table."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..cli.options import HelpFormatter, add_checkpoint, add_device, add_json_file, count
    from ..cli.output import say, write_results

    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.finetuning",
        formatter_class=HelpFormatter,
        description="Trains LoRA on the demo's scenes with and without compression and prints accuracy on others.",
    )
    add_checkpoint(parser)
    parser.add_argument("--setting", default=DEFAULT_SETTING, metavar="SETTING", help="the compressed setting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one training each")
    parser.add_argument("--steps", type=count, default=recipe.steps, metavar="N", help="training steps")
    parser.add_argument("--batch-size", type=count, default=recipe.batch_size, metavar="N", help="rows per step")
    parser.add_argument(
        "--learning-rate", type=float, default=recipe.learning_rate, metavar="RATE", help="peak learning rate"
    )
    parser.add_argument("--compressed-only", action="store_true", help="skip the training on all tokens")
    parser.add_argument("--limit", type=count, default=600, metavar="N", help="held-out questions")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="pass over the first N held-out scenes")
    add_json_file(parser)
    add_device(parser)
    arguments = parser.parse_args(argv)
    setting = parse_setting(arguments.setting)
    recipe = Recipe(arguments.steps, arguments.batch_size, arguments.learning_rate)
    samples, ways = demo_samples(arguments.limit, arguments.skip), WAYS[:1] if arguments.compressed_only else WAYS
    with quiet():
        model, processor = load(arguments.model, {}, arguments.device, "float32")
        report = finetune(model, processor, setting, samples, recipe, arguments.seeds, ways=ways)
    pictures = len({sample.picture for sample in samples})
    say(f"{arguments.model}, {setting.name}: {len(samples)} questions on {pictures} held-out scenes; {recipe}", "")
    say(report.markdown())
    facts = {"model": arguments.model, "setting": setting.name, **dataclasses.asdict(recipe)}
    write_results(arguments, lambda: {**facts, **report.to_dict()})
    return 0


__all__ = ["FinetuningReport", "Recipe", "finetune", "train_lora"]

if __name__ == "__main__":
    raise SystemExit(main())
