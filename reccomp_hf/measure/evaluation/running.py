"""Asks a model every question under every setting."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ...core import splicing
from ...core.features import TokenRecoveryOutput
from ...core.rules import find_rule
from ...core.vision import needed_states
from ...data.progress import progress_bar
from .report import EvaluationReport, SettingResult
from .samples import Sample, encode_samples, normalize_answer, with_encoded_images
from .settings import OFF, Setting, parse_setting, parse_settings

DEFAULT_BATCH_SIZE = 64


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: str | Iterable[str | Setting],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = 16,
    instruction: str = "",
    progress: bool | None = None,
) -> EvaluationReport:
    """Ask a compressed model every question, greedily and in batches, under every setting.

    Images are prepared and prompts encoded once for all settings. The uncompressed model (`off`) always runs too,
    because agreement is measured against it.

    Args:
        model: A compressed LLaVA, in eval mode.
        processor: The model's processor.
        samples: Questions and answers, see `demo_samples` and `load_samples`.
        settings: Settings to compare, see `parse_setting`.
        batch_size: Number of questions per batch; it affects the time, and the answers by rounding at most.
        max_new_tokens: Longest answer in tokens.
        instruction: Text appended to each question in the prompt on a line of its own; CLIP does not read it.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Returns:
        An [`EvaluationReport`].

    Raises:
        ValueError: There are no samples, or a setting or the batch size is not valid.
    """
    if not samples or batch_size < 1:
        raise ValueError(f"There must be samples and a batch size >= 1, got {len(samples)} samples and {batch_size}.")
    table = parse_settings(settings)
    table = table if any(setting.is_off for setting in table) else [parse_setting(OFF), *table]
    for setting in table:  # before any work
        model.config.token_recovery.replace(setting.fields)
    runs = {setting.name: _Run(setting) for setting in table}
    starts = range(0, len(samples), batch_size)
    with progress_bar(len(starts) * len(table), "batches", progress) as bar:
        for start in starts:
            batch = samples[start : start + batch_size]
            encoded = encode_samples(processor, batch, instruction).to(model.device, model.dtype)
            inputs = _Inputs(encoded, [sample.question for sample in batch])
            for run in runs.values():
                if start == 0:  # warm up
                    run.ask(model, processor, inputs, batch, max_new_tokens=1)
                run.take(batch, *run.ask(model, processor, inputs, batch, max_new_tokens))
                bar.update()
    results = {name: run.result(samples) for name, run in runs.items()}
    return EvaluationReport.of_samples(samples, results, next(setting.name for setting in table if setting.is_off))


class _Inputs:
    """A batch; the vision tower runs once for all settings that read the same hidden states."""

    def __init__(self, tensors: Any, questions: Sequence[str]) -> None:
        self.tensors, self._questions = tensors, questions
        self._encoded: dict[frozenset[int], tuple[dict[str, Any], float]] = {}

    def of(self, model: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Arguments of a call with these fields, and the seconds that the vision tower took for them."""
        section = model.config.token_recovery.replace(fields)
        if not section.enabled:
            return dict(self.tensors), 0.0
        layer, blocks = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
        key = frozenset(needed_states(section, layer, blocks, text=True))
        if key not in self._encoded:
            began = _now(model)
            inputs = with_encoded_images(model, self.tensors, fields)
            self._encoded[key] = inputs, _now(model) - began
        inputs, seconds = self._encoded[key]
        if section.rules:
            rules = [find_rule(section.rules, text) for text in self._questions]
            inputs = {**inputs, "recovery_rule": torch.tensor(rules)}
        return dict(inputs), seconds


class _Run:
    """A setting while it is evaluated."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.answers: list[str] = []
        self.tokens: list[int] = []
        self.hits: list[tuple[float, float]] = []
        self.seconds = 0.0

    def ask(
        self, model: Any, processor: Any, inputs: _Inputs, batch: Sequence[Sample], max_new_tokens: int
    ) -> tuple[list[str], list[int], list[tuple[float, float]], float]:
        """Answers, visual tokens and object hits of a batch, and the seconds it took."""
        fields, image_token = self.setting.fields, model.config.image_token_id
        positions = {}
        if fields.get("enabled", True) and _position_ids(model, fields) == "original":
            positions["position_ids"] = splicing.counted_positions(inputs.tensors["attention_mask"])
        tensors, seconds = inputs.of(model, fields)
        began = _now(model)
        short, record = model.compress_inputs(**tensors, **positions, token_recovery=fields)
        ids = model.generate(**short, do_sample=False, max_new_tokens=max_new_tokens)
        seconds += _now(model) - began
        prompt = short["input_ids"]
        answers = processor.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
        tokens = (prompt == image_token).sum(-1).tolist()
        return [answer.strip() for answer in answers], tokens, _hits(batch, tokens, record), seconds

    def take(
        self, batch: Sequence[Sample], answers: list[str], tokens: list[int], hits: list[tuple[float, float]], s: float
    ) -> None:
        """Keep the results of `ask`."""
        self.answers += answers
        self.tokens += tokens
        self.hits += hits
        self.seconds += s

    def result(self, samples: Sequence[Sample]) -> SettingResult:
        """The results of all batches."""
        given = zip(self.answers, samples, strict=True)
        right = [normalize_answer(answer) in map(normalize_answer, sample.answers) for answer, sample in given]
        hits = np.array(self.hits, dtype=float)
        return SettingResult(
            name=self.setting.name,
            fields=self.setting.fields,
            answers=self.answers,
            right=np.array(right),
            tokens=np.array(self.tokens),
            seconds_per_sample=self.seconds / len(samples),
            object_recall=hits[:, 0],
            object_precision=hits[:, 1],
        )


def _position_ids(model: Any, fields: dict[str, Any]) -> str:
    return str(fields.get("position_ids", model.config.token_recovery.position_ids))


def _now(model: Any) -> float:
    """The time in seconds, taken when the device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _hits(batch: Sequence[Sample], tokens: list[int], record: TokenRecoveryOutput | None) -> list[tuple[float, float]]:
    """Recall and precision of every row: kept share of the asked object's patches, share of kept patches on it.

    NaN where the object is unknown, where an image has several tiles, or where no patch is kept as it is. A patch
    belongs to the object if its centre lies in the object's box.
    """
    unknown = (math.nan, math.nan)
    if not any(sample.box for sample in batch) or (record is not None and len(record.counts) != len(batch)):
        return [unknown] * len(batch)
    patches = tokens[0] if record is None else record.cluster.shape[1]  # the uncompressed model keeps all patches
    kept = torch.ones(len(batch), patches, dtype=torch.bool)
    if record is not None:
        kept = record.kept_mask.cpu()
    side, result = math.isqrt(patches), []
    for sample, row in zip(batch, kept.numpy(), strict=True):
        if sample.box is None or side * side != patches or not row.any():
            result.append(unknown)
            continue
        on_object = _patches_in(sample.box, side)
        both = float((on_object & row).sum())
        result.append((both / on_object.sum() if on_object.any() else math.nan, both / row.sum()))
    return result


def _patches_in(box: tuple[float, float, float, float], side: int) -> Any:
    """(side * side,) bool, patches whose centre lies in a box."""
    middles = (np.arange(side) + 0.5) / side
    left, top, right, bottom = box
    across, down = ((low <= middles) & (middles < high) for low, high in ((left, right), (top, bottom)))
    return np.array([row and column for row, column in itertools.product(down, across)])


__all__ = ["DEFAULT_BATCH_SIZE", "evaluate"]
