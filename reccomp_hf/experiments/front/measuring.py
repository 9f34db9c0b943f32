"""Measures the accuracy of every method over the number of visual tokens; what was measured is kept in a file."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.loading import load
from ...cli.choices import EVAL_METHODS
from ...core.methods.registry import get_method
from ...data.prompts import build_prompt
from ...measure.evaluation.report import EvaluationReport
from ...measure.evaluation.samples import Sample, demo_samples, encode_samples
from ...measure.evaluation.settings import OFF, named_settings, parse_setting
from ...measure.tuning.candidates import at_budget
from ...measure.tuning.measuring import read_along
from ..kept_answers import KeptAnswers, result_of

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
) -> dict[str, list[tuple[int, int]]]:
    """Grades and visual tokens of a batch, a pair for each question, by the name of the setting."""
    inputs = encode_samples(processor, samples).to(model.device, model.dtype)
    answers, counted = (part.to(model.device) for part in answer_tokens(processor, samples))
    read = read_along(model, inputs, answers, counted, settings)
    return {
        name: list(zip(graded(logits.argmax(-1), answers, counted), counts, strict=True))
        for name, logits, counts in read
    }


def run(name: str, questions: int, path: str | Path | None, names: Sequence[str]) -> list[EvaluationReport]:
    """Measure what the file lacks; returns the reports of first words and of whole answers.

    Args:
        name: A demo model.
        questions: Number of held-out questions.
        path: File that keeps what was measured, see [`KeptAnswers`].
        names: The settings, see `front_settings`.
    """
    kept, samples = KeptAnswers(*load(name, {}), path), demo_samples(questions)
    settings = {setting: parse_setting(setting).fields for setting in names}
    rows = kept.kept("grades", samples, settings, functools.partial(measured, kept.model, kept.processor))
    return [report_of(samples, rows, least) for least in (BEGUN, WHOLE)]


def report_of(samples: Sequence[Sample], rows: Mapping[str, Sequence[Sequence[int]]], least: int) -> EvaluationReport:
    """The report of grades of at least `least`, with intervals over scenes."""
    results = {}
    for name, pairs in rows.items():
        grades, tokens = np.array(pairs).T
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
