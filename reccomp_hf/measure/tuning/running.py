"""Tuning: measures settings on one part of the questions, chooses, and measures the choice on the other part."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core.rules import CHANGED_BY_RULES
from ...core.settings import FIELDS
from ...data.parts import Parts
from ...data.progress import progress_bar
from ..evaluation.samples import Sample
from ..intervals import Draws
from .candidates import LISTS, candidate_settings
from .choosing import Plan, Scores, survivors
from .goal import DYNAMIC, PRESENT, Goal
from .kinds import beginnings
from .measuring import Measurement, measure
from .result import Tuning, contenders_of, decide, section_of
from .store import Store, fingerprint
from .thresholds import dynamic_fields

DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS = 16, 16
_LEAST_PICTURES = 4
_LEAST_SURVIVORS = 8  # settings of a budget that successive halving keeps


def tune(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    budget: int | float | None = None,
    average: int | float | None = None,
    agreement: float | None = None,
    frontier: bool = False,
    dynamic: bool = False,
    by_question: bool = False,
    candidates: str | Sequence[str] = "few",
    shared: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    instruction: str = "",
    seed: int = 0,
    progress: bool | None = None,
) -> Tuning:
    """Find the settings that change a model's answers least, on questions without answers.

    The uncompressed model answers every question once. Settings are compared by the mean Jensen-Shannon divergence
    (Lin, 1991) of their next-token distributions along that answer, see [`Measurement`], on half of the images. The
    choice is measured on the other half, and replaces the present section only where the paired bootstrap over images
    says that it is closer to the uncompressed model. The model is not changed.

    Args:
        model: A compressed LLaVA in eval mode.
        processor: The model's processor.
        samples: 100 to 200 questions or more, see `load_samples` with `answered=False`.
        budget: Tokens of an image, or a share of its patches; by default the present section's, else 0.1.
        average: Mean tokens of an image over all questions, or a share of the patches: with `by_question` or
            `dynamic`, which vary the number; otherwise as `budget`.
        agreement: The share of answers to keep with the fewest tokens, in (0, 1].
        frontier: Measure the best settings of several budgets, and choose none.
        dynamic: With `average`: the paper's method with the threshold that gives this mean.
        by_question: Choose a setting for each beginning of a question too, see `rules` of [`TokenRecoveryConfig`].
        candidates: `"few"` (diverse settings), `"many"` (compared by successive halving), or names of settings
            without a budget, see `parse_setting`.
        shared: Fields that all candidates get, `{"position_ids": "compact"}` for example.
        output: Section file to write; measurements are kept in `OUTPUT.parts` until then, and a killed run resumes.
        overwrite: Start over where the output or its parts exist.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer in tokens.
        instruction: Text below each question in the prompt, which CLIP does not read.
        seed: Seed of the split and of the bootstrap.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Returns:
        A [`Tuning`] with the section and how it was found.

    Raises:
        ValueError: Arguments that contradict each other, too few images, or settings that do not fit the checkpoint.
        FileExistsError: The output is finished.
    """
    goal = Goal(budget, average, agreement, frontier, dynamic, by_question)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    choosing, reporting = _split(samples, seed)
    settings, budgets = _candidates(model, goal, candidates, shared or {})
    parts, store, halving = None if output is None else Parts(output), Store(), candidates == "many"
    if parts is not None:
        parts.check_output(overwrite)
        asked = {"goal": dataclasses.asdict(goal), "settings": settings, "halving": halving, "batch_size": batch_size}
        asked |= {"max_new_tokens": max_new_tokens, "instruction": instruction, "seed": seed}
        asked = fingerprint(model, processor, [*choosing, *reporting], asked)
        parts.prepare(asked, overwrite)
        store = Store(parts, asked)
    batches = [_batches(part, batch_size) for part in (choosing, reporting)]
    with _open(model, processor, store, sum(map(len, batches)), max_new_tokens, instruction, progress) as measured:
        scores, plans = None, {}
        if goal.dynamic:
            assert average is not None  # `Goal` has checked it
            fields = dynamic_fields(model, processor, choosing, average, shared or {}, batch_size, progress)
            name = f"paper+outlier_threshold={fields['outlier_threshold']}"
            settings, plans = {name: fields}, {DYNAMIC: Plan(name)}
        else:
            scores = _choose(measured, batches[0], settings, budgets, halving=halving)
            groups = beginnings([sample.question for sample in choosing])
            plans = goal.contenders(scores, groups, halves(choosing), budgets, model.config)
        plans = {PRESENT: Plan(PRESENT), **plans}
        settings = {PRESENT: goal.present_fields(model.config), **settings}
        wanted = {name: settings[name] for plan in plans.values() for name in plan.settings}
        reported = _join(measured(len(batches[0]) + index, batch, wanted) for index, batch in enumerate(batches[1]))
    groups = beginnings([sample.question for sample in reporting])
    draws = Draws([sample.picture for sample in reporting], seed=seed)
    contenders = contenders_of(plans, reported, groups, draws)
    chosen, reason = decide(goal, contenders, reported, groups, draws)
    tuning = Tuning(
        goal=goal,
        section=None if chosen is None else section_of(plans[chosen], settings),
        chosen=chosen,
        reason=reason,
        contenders=contenders,
        chosen_on=len(choosing),
        reported_on=len(reporting),
        scores=scores,
        budgets=budgets,
    )
    if parts is not None:
        parts.finish([tuning.to_json()])
    return tuning


def _split(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Questions to choose on and questions to report on, without an image in common."""
    pictures = list(dict.fromkeys(sample.picture for sample in samples))
    if len(pictures) < _LEAST_PICTURES:
        raise ValueError(
            f"Tuning needs questions on {_LEAST_PICTURES} images or more, since it chooses on half of them and "
            f"reports on the others, got {len(pictures)}; 100 to 200 questions are a good number."
        )
    order = np.random.default_rng(seed).permutation(len(pictures))
    first = {pictures[index] for index in order[: len(pictures) // 2]}
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        parts[sample.picture not in first].append(sample)
    return parts


def halves(samples: Sequence[Sample]) -> Any:
    """(Q,) bool, the questions on every other image."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(sample.picture, len(numbers)) % 2 == 0 for sample in samples])


def _candidates(
    model: Any, goal: Goal, names: str | Sequence[str], shared: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, int | float]]:
    """Fields and budgets of the candidates by name."""
    listed = LISTS.get(names, names) if isinstance(names, str) else names
    if isinstance(listed, str) or not listed:
        raise ValueError(f"candidates must be 'few', 'many' or names of settings, got {names!r}.")
    found: dict[str, dict[str, Any]] = {}
    budgets: dict[str, int | float] = {}
    for budget in goal.budgets(model.config):
        strict = listed is names
        settings = candidate_settings(model, listed, budget, shared, strict=strict)
        found |= {name: setting.fields for name, setting in settings.items()}
        budgets |= dict.fromkeys(settings, budget)
    if goal.by_question:
        _check_rules(found)
    return found, budgets


def _check_rules(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings of which rules by question could not choose: those that differ in a field of all rows."""
    first, *others = settings.items()
    for (name, fields), field in itertools.product(others, sorted({*FIELDS} - CHANGED_BY_RULES)):
        if fields.get(field) != first[1].get(field):
            raise ValueError(
                f"Candidates {first[0]!r} and {name!r} differ in {field}, which rules by question cannot change: give "
                f"it for all of them (--set {field}=...), or tune without --by-question."
            )


def _batches(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


@contextlib.contextmanager
def _open(
    model: Any,
    processor: Any,
    store: Store,
    total: int,
    max_new_tokens: int,
    instruction: str,
    show: bool | None,
) -> Iterator[Any]:
    """A function `measured(number, samples, settings)` that measures a batch, or reads its stored measurements."""
    with progress_bar(total, "batches", show) as bar, store.open() as stored:

        def measured(
            number: int, samples: Sequence[Sample], settings: Mapping[str, Mapping[str, Any]]
        ) -> dict[str, list[Measurement]]:
            values = stored(number, lambda: measure(model, processor, samples, settings, max_new_tokens, instruction))
            bar.update()
            return values

        yield measured


def _choose(
    measured: Any,
    batches: Sequence[Sequence[Sample]],
    settings: Mapping[str, Mapping[str, Any]],
    budgets: Mapping[str, int | float],
    *,
    halving: bool,
) -> Scores:
    """Measurements on all batches; with successive halving, of the settings that stay to the end.

    Half of the settings of a budget leave after a quarter of the batches, and again half of them after the half.
    """
    names, results = list(settings), list[dict[str, list[Measurement]]]()
    ends = {-(-len(batches) // 4), -(-len(batches) // 2)} - {len(batches)} if halving else set()
    for number, batch in enumerate(batches):
        if number in ends:
            scores = _join(results).some(names)
            names = survivors(scores, [budgets[name] for name in names], _LEAST_SURVIVORS)
        results.append(measured(number, batch, {name: settings[name] for name in names}))
    return _join([{name: result[name] for name in names} for result in results])


def _join(results: Any) -> Scores:
    """Scores of the settings that all batches measured."""
    results = list(results)
    names = [name for name in results[-1] if all(name in result for result in results)]
    return Scores.of({name: [one for result in results for one in result[name]] for name in names})


__all__ = ["DEFAULT_BATCH_SIZE", "DEFAULT_NEW_TOKENS", "halves", "tune"]
