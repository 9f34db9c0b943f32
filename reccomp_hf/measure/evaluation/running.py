"""Asking a model every question under every setting."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ...core import splicing
from ...core.features import TokenRecoveryOutput
from ...core.methods.registry import get_method
from ...core.vision import EncodedImages
from .report import EvaluationReport, SettingResult
from .samples import Sample, normalize_answer
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

    A picture is prepared and a prompt encoded once for all settings. The uncompressed model (`off`) always runs too,
    since agreement is told against it.

    Args:
        model: A compressed LLaVA, in eval mode.
        processor: Its processor.
        samples: What is asked, see `demo_samples` and `load_samples`.
        settings: See `parse_setting`.
        batch_size: Questions read at once; it changes the time, and rounding at most.
        max_new_tokens: Longest answer.
        instruction: Appended to each question in the prompt (not in what CLIP reads), on a line of its own.
        progress: Show a progress bar; `None` where stderr is a terminal.

    Returns:
        An [`EvaluationReport`].

    Raises:
        ValueError: No samples, an impossible setting or batch size.
    """
    if not samples or batch_size < 1:
        raise ValueError(f"There must be samples and a batch size >= 1, got {len(samples)} samples and {batch_size}.")
    table = parse_settings(settings)
    table = table if any(setting.is_off for setting in table) else [parse_setting(OFF), *table]
    for setting in table:  # before any work
        model.config.token_recovery.replace(setting.fields)
    runs = {setting.name: _Run(setting) for setting in table}
    starts = range(0, len(samples), batch_size)
    bar = tqdm(
        total=len(starts) * len(table),
        desc="batches",
        file=sys.stderr,
        disable=None if progress is None else not progress,
    )
    with bar:
        for start in starts:
            batch = samples[start : start + batch_size]
            inputs = _Inputs(encode(processor, batch, instruction).to(model.device, model.dtype))
            for run in runs.values():
                if start == 0:  # what the first call of all costs is not the setting's
                    run.ask(model, processor, inputs, batch, max_new_tokens=1)
                run.take(batch, *run.ask(model, processor, inputs, batch, max_new_tokens))
                bar.update()
    return EvaluationReport(
        questions=[sample.question for sample in samples],
        kinds=[sample.kind for sample in samples],
        pictures=[sample.picture for sample in samples],
        results={name: run.result(samples) for name, run in runs.items()},
        reference=next(setting.name for setting in table if setting.is_off),
    )


class _Inputs:
    """A batch; its pictures go through the vision tower once for all settings that read the same hidden states."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors
        self._encoded: dict[tuple[Any, ...], tuple[EncodedImages, float]] = {}

    def of(self, model: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Arguments of a call with these settings, and the seconds that their share of the vision tower took."""
        section = model.config.token_recovery.replace(fields)
        if not section.enabled:
            return dict(self.tensors), 0.0
        reads = get_method(section.method).reads_question(section)
        key = (section.visual_layer, section.text_relevance if reads else None)
        if key not in self._encoded:
            began = _now(model)
            encoded = model.encode_images(**self.tensors, token_recovery=fields)
            self._encoded[key] = encoded, _now(model) - began
        encoded, seconds = self._encoded[key]
        others = {name: value for name, value in self.tensors.items() if name not in ("pixel_values", "image_sizes")}
        return {**others, "pixel_values": encoded}, seconds


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
        """Keep what `ask` found."""
        self.answers += answers
        self.tokens += tokens
        self.hits += hits
        self.seconds += s

    def result(self, samples: Sequence[Sample]) -> SettingResult:
        """All of it."""
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


def encode(processor: Any, batch: Sequence[Sample], instruction: str) -> Any:
    """The processor's tensors for a batch, a picture and a question a row."""
    opened = {sample.picture: sample for sample in batch}
    pictures = {name: sample.open() for name, sample in opened.items()}
    return encode_rows(
        processor,
        [[pictures[sample.picture]] for sample in batch],
        [instructed(sample.question, instruction) for sample in batch],
        [sample.question for sample in batch],
    )


def instructed(question: str, instruction: str) -> str:
    """A question with an answer instruction on a line of its own, if there is one."""
    return f"{question}\n{instruction}" if instruction else question


def encode_rows(
    processor: Any,
    pictures: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    recovery: Sequence[str | Sequence[str]],
) -> Any:
    """The processor's tensors for rows of one or more pictures and a user turn each, padded on the left.

    Args:
        processor: Of a compressed LLaVA.
        pictures: Of every row.
        texts: What the language model reads of the user's turn.
        recovery: What CLIP reads.
    """
    return processor(
        images=[picture for row in pictures for picture in row],
        text=[prompt_of(processor, text, len(row)) for text, row in zip(texts, pictures, strict=True)],
        recovery_text=recovery,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def visual_tokens_read(output: Any, pictures: Sequence[int], placeholders: list[int]) -> list[int]:
    """How many tokens the language model read for the pictures of every row, LLaVA-NeXT's newlines included.

    Args:
        output: What `generate` returned with `return_dict_in_generate`.
        pictures: How many a row has.
        placeholders: Of every row; what is read where nothing was compressed.
    """
    if output.visual_token_counts is None:
        return placeholders
    counts = (output.visual_token_counts + output.newline_counts).cpu()
    return [int(of_row.sum()) for of_row in counts.split(list(pictures))]


def prompt_of(processor: Any, text: str, pictures: int) -> str:
    """A question as the chat template asks it, or as LLaVA-1.5 does where there is none."""
    if processor.chat_template is None:
        placeholders = f"{processor.image_token}\n" * pictures
        return f"USER: {placeholders}{text} ASSISTANT:"
    turn = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True))


def _position_ids(model: Any, fields: dict[str, Any]) -> str:
    return str(fields.get("position_ids", model.config.token_recovery.position_ids))


def _now(model: Any) -> float:
    """Seconds, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _hits(batch: Sequence[Sample], tokens: list[int], record: TokenRecoveryOutput | None) -> list[tuple[float, float]]:
    """Of every row: the share of the asked object's patches that is kept, and of kept patches that lie on it.

    Not a number where it is not known what is asked about, where a picture has several tiles, or where nothing is kept
    as it is. A patch is the object's if its middle lies in the object's box.
    """
    unknown = (math.nan, math.nan)
    if not any(sample.box for sample in batch) or (record is not None and len(record.counts) != len(batch)):
        return [unknown] * len(batch)
    patches = tokens[0] if record is None else record.cluster.shape[1]  # the uncompressed model keeps all
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
    """(side * side,) bool, patches whose middle lies in a box."""
    middles = (np.arange(side) + 0.5) / side
    left, top, right, bottom = box
    across, down = ((low <= middles) & (middles < high) for low, high in ((left, right), (top, bottom)))
    return np.array([row and column for row, column in itertools.product(down, across)])


__all__ = ["DEFAULT_BATCH_SIZE", "encode", "encode_rows", "evaluate", "instructed", "prompt_of", "visual_tokens_read"]
