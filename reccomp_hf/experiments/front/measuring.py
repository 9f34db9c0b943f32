"""Measures the accuracy of every method over the number of visual tokens, batch by batch into a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.loading import load
from ...cli.choices import EVAL_METHODS
from ...core.methods.registry import get_method
from ...data.parts import Parts
from ...data.progress import progress_bar
from ...data.prompts import build_prompt
from ...measure.evaluation.report import EvaluationReport
from ...measure.evaluation.samples import Sample, demo_samples, encode_samples
from ...measure.evaluation.settings import OFF, named_settings, parse_setting
from ...measure.tuning.candidates import at_budget
from ...measure.tuning.measuring import read_along
from ...measure.tuning.store import fingerprint
from ..kept_answers import result_of

BUDGETS = (4, 7, 10, 14, 16, 22, 36, 72)
OWN = ("balanced", "balanced-v1")
_SAID_OTHERWISE = ("recoverable", "pooling")
"""Methods whose settings `paper` and `pool` are."""
PUBLISHED = (
    "paper",
    *(
        name
        for name in EVAL_METHODS
        if get_method(named_settings()[name]["method"]).budget != "none" and name not in _SAID_OTHERWISE
    ),
    "pool",
)
_PLACES = "+position_ids=original"
_VALUE = f"+text_relevance=value+text_relevance_sign=1{_PLACES}"
MOVED = tuple(f"{name}{_VALUE if name in ('paper', 'trim', 'cdpruner') else _PLACES}" for name in PUBLISHED[:-1])
"""The published methods with what `balanced` has besides its choice: original positions, and the value path."""
OWN_COUNT = ("authors",)
"""Methods that take no budget."""
_BATCH = 64
WRONG, BEGUN, WHOLE = range(3)


def front_settings(names: Sequence[str] = (*OWN, *PUBLISHED, *MOVED), budgets: Sequence[int] = BUDGETS) -> list[str]:
    """All settings of the experiment: the uncompressed model first."""
    return [OFF, *(at_budget(name, budget) for budget in budgets for name in names), *OWN_COUNT]


def answer_tokens(processor: Any, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The tokens of the expected answers as they follow a prompt, with the token that ends an answer.

    Returns:
        (R, T) int64 and (R, T) bool, the tokens that belong to an answer.
    """
    tokenizer, rows = processor.tokenizer, list[list[int]]()
    for sample in samples:
        prompt = build_prompt(processor, sample.question, 1)
        texts = (prompt, f"{prompt} {sample.answers[0]}")
        alone, both = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        rows.append([*both[len(alone) :], tokenizer.eos_token_id])
    width = max(map(len, rows))
    counted = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    return ids, counted


def graded(predicted: Tensor, answers: Tensor, counted: Tensor) -> list[int]:
    """How far each prediction goes: `WRONG`, `BEGUN` (the answer's words, and then more), or `WHOLE`.

    Args:
        predicted: (R, T) int64, the most probable token at each place, after the answer's tokens before it.
        answers: (R, T) int64, the expected tokens.
        counted: (R, T) bool, the tokens of each answer, the last of which ends it.
    """
    equal = (predicted == answers) | ~counted
    last = counted & (counted.cumsum(-1) == counted.sum(-1, keepdim=True))
    grades: list[int] = ((equal | last).all(-1).int() + equal.all(-1).int()).tolist()
    return grades


def measured(
    model: Any, processor: Any, samples: Sequence[Sample], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[list[int]]]:
    """Grades and visual tokens of a batch, `[grades, tokens]` by the name of the setting."""
    inputs = encode_samples(processor, samples).to(model.device, model.dtype)
    answers, counted = (part.to(model.device) for part in answer_tokens(processor, samples))
    read = read_along(model, inputs, answers, counted, settings)
    return {name: [graded(logits.argmax(-1), answers, counted), counts] for name, logits, counts in read}


def run(name: str, questions: int, store: Path, names: Sequence[str]) -> list[EvaluationReport]:
    """Measure what the store lacks; returns the reports of first words and of whole answers.

    Args:
        name: A demo model.
        questions: Number of held-out questions; whole batches of 64 are measured.
        store: A file name; the measurements of each batch are appended to the folder `STORE.parts`.
        names: The settings, see `front_settings`.

    Raises:
        ValueError: The store holds the measurements of another model or of other settings.
    """
    model, processor = load(name, {})
    settings = {setting: parse_setting(setting).fields for setting in names}
    parts, batches = Parts(store), -(-questions // _BATCH)
    store.parent.mkdir(parents=True, exist_ok=True)
    parts.prepare(fingerprint(model, processor, [], {"settings": settings, "batch": _BATCH}), overwrite=False)
    samples = demo_samples(batches * _BATCH)
    held = parts.lines()
    with parts.writer(0) as write, progress_bar(batches, "batches") as bar:
        for number in range(batches):
            if number not in held:
                batch = samples[number * _BATCH : (number + 1) * _BATCH]
                values = measured(model, processor, batch, settings)
                held[number] = json.dumps({"row": number, "measured": values}) + "\n"
                write([held[number]])
            bar.update()
    lines = [json.loads(held[number])["measured"] for number in range(batches)]
    return [report_of(samples[:questions], lines, least) for least in (BEGUN, WHOLE)]


def report_of(
    samples: Sequence[Sample], batches: Sequence[Mapping[str, Sequence[Sequence[int]]]], least: int
) -> EvaluationReport:
    """The report of grades of at least `least`, with intervals over scenes."""
    results = {}
    for name in batches[0]:
        columns = (np.concatenate([batch[name][part] for batch in batches]) for part in (0, 1))
        grades, tokens = (column[: len(samples)] for column in columns)
        results[name] = result_of(name, [], grades >= least, tokens)
    return EvaluationReport.of_samples(samples, results, OFF)


__all__ = [
    "BEGUN",
    "BUDGETS",
    "MOVED",
    "OWN",
    "PUBLISHED",
    "WHOLE",
    "WRONG",
    "answer_tokens",
    "front_settings",
    "graded",
    "measured",
    "report_of",
    "run",
]
