"""Choosing settings from measurements: one for all questions, or one for each kind of question."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...core.rules import MOST_RULES
from .kinds import NO_GROUP
from .measuring import Measurement

SHRINKAGE = 10
"""A group's mean counts as if this many more questions had the common mean."""
SMALLEST_GROUP = 5
"""Questions of smaller groups keep the common setting."""
MOST_GROUPS = MOST_RULES
"""Groups, the largest ones, that can have a setting of their own: each may need a rule."""
_PRICES = (0.0, *np.geomspace(1e-6, 1.0, 241))  # bits of divergence that a visual token may cost

_Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Measurements of S settings on Q questions.

    Attributes:
        names: The settings.
        divergence: (S, Q) in bits.
        agrees: (S, Q) 0 or 1.
        tokens: (S, Q) visual tokens.
    """

    names: tuple[str, ...]
    divergence: _Floats
    agrees: _Floats
    tokens: _Floats

    @classmethod
    def of(cls, measured: Mapping[str, Sequence[Measurement]]) -> Scores:
        """Scores of measurements by setting, all on the same questions."""
        rows = [[dataclasses.astuple(one) for one in measurements] for measurements in measured.values()]
        values = np.array(rows, dtype=float)
        return cls(tuple(measured), values[..., 0], values[..., 1], values[..., 2])

    def of_plan(self, plan: Plan, groups: Sequence[str]) -> Scores:
        """The scores (1, Q) of a plan, given each question's group."""
        row_of = {group: self.names.index(plan.setting(group)) for group in set(groups)}
        rows = np.array([row_of[group] for group in groups])
        picked = (values[rows, np.arange(len(rows))][None] for values in (self.divergence, self.agrees, self.tokens))
        return Scores(("plan",), *picked)

    def some(self, names: Iterable[str]) -> Scores:
        """The scores of some of the settings."""
        rows = [self.names.index(name) for name in names]
        values = (self.divergence[rows], self.agrees[rows], self.tokens[rows])
        return Scores(tuple(self.names[row] for row in rows), *values)

    def questions(self, counted: npt.NDArray[np.bool_]) -> Scores:
        """The scores of some of the questions, (Q,) bool."""
        return Scores(self.names, *(value[:, counted] for value in (self.divergence, self.agrees, self.tokens)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A setting for every question.

    Attributes:
        common: Name of the setting for questions of no group.
        groups: Names of settings by group, where they differ from the common one.
    """

    common: str
    groups: dict[str, str] = dataclasses.field(default_factory=dict)

    def setting(self, group: str) -> str:
        """The setting of a group's questions."""
        return self.groups.get(group, self.common)

    @property
    def settings(self) -> tuple[str, ...]:
        """All settings of the plan, the common one first."""
        return tuple(dict.fromkeys((self.common, *self.groups.values())))


def plans_by_group(scores: Scores, groups: Sequence[str], common: str) -> list[Plan]:
    """A setting for each group of questions, for each of 242 prices of a token, from no price up.

    A group's mean divergence is shrunk toward the mean of all questions. What the groups get is the best at its price,
    so nothing else has both fewer tokens and a smaller divergence by these means.

    Args:
        scores: The measurements.
        groups: Each question's group.
        common: The setting of questions of no group. The price does not choose it: where all questions of the data
            have a group, it would cost nothing there, and more than was asked for with other questions.
    """
    keys, index, sizes = np.unique(list(groups), return_inverse=True, return_counts=True)
    members = np.eye(len(keys))[index]  # (Q, G)
    large = np.zeros(len(keys), bool)
    large[np.argsort(-np.where(keys == NO_GROUP, 0, sizes), kind="stable")[:MOST_GROUPS]] = True
    large &= (sizes >= SMALLEST_GROUP) & (keys != NO_GROUP)
    mean = scores.divergence.mean(1, keepdims=True)
    shrunk = (scores.divergence @ members + SHRINKAGE * mean) / (sizes + SHRINKAGE)
    tokens = scores.tokens @ members / sizes
    plans = []
    for price in _PRICES:
        best = np.argmin(shrunk + price * tokens, axis=0)
        chosen = {str(key): scores.names[row] for key, row in zip(keys[large], best[large], strict=True)}
        plans.append(Plan(common, {key: name for key, name in chosen.items() if name != common}))
    return plans


def closest(scores: Scores) -> Plan:
    """The setting with the smallest mean divergence, for all questions."""
    return Plan(scores.names[int(np.argmin(scores.divergence.mean(1)))])


def within(plans: Sequence[Plan], scores: Scores, groups: Sequence[str], tokens: float) -> Plan:
    """The plan with the smallest divergence among those of at most `tokens` on average, else the smallest."""
    means = [scores.of_plan(plan, groups).tokens.mean() for plan in plans]
    least = max(tokens, min(means)) + 1e-6
    fitting = [plan for plan, mean in zip(plans, means, strict=True) if mean <= least]
    return min(fitting, key=lambda plan: scores.of_plan(plan, groups).divergence.mean())


def cheapest(
    plans_of: Callable[[Scores, Sequence[str]], list[Plan]],
    scores: Scores,
    groups: Sequence[str],
    folds: npt.NDArray[np.bool_],
    agreement: float,
) -> Plan:
    """The plan with the fewest tokens among those that keep a share of the answers, else the one that keeps most.

    The share is measured on questions on which the plan was not chosen: on each fold, with the plans of the other
    one. On the questions of the choice itself the best of many looks better than it is.

    Args:
        plans_of: A function that makes plans from measurements, always the same number in the same order.
        scores: The measurements.
        groups: Each question's group.
        folds: (Q,) bool, the questions of one fold.
        agreement: The share of the answers.
    """
    kept: list[_Floats] = []
    for fold in (folds, ~folds):
        inside, outside = (list(itertools.compress(groups, part)) for part in (fold, ~fold))
        plans, measured_on = plans_of(scores.questions(~fold), outside), scores.questions(fold)
        kept.append(np.array([measured_on.of_plan(plan, inside).agrees.sum() for plan in plans]))
    shares, plans = np.sum(kept, 0) / len(groups), plans_of(scores, groups)
    least = min(agreement, shares.max())
    fitting = [plan for plan, share in zip(plans, shares, strict=True) if share >= least]
    return min(fitting, key=lambda plan: scores.of_plan(plan, groups).tokens.mean())


def survivors(scores: Scores, families: Sequence[Any], least: int) -> list[str]:
    """The better half of the settings of every family by mean divergence, at least `least` of each.

    Args:
        scores: The measurements so far.
        families: The family of each setting: those of equal budget compete.
        least: Number of settings of a family that always stay.
    """
    divergence = scores.divergence.mean(1)
    kept: set[int] = set()
    for family in dict.fromkeys(families):
        rows = [row for row, own in enumerate(families) if own == family]
        rows.sort(key=lambda row: divergence[row])
        kept |= set(rows[: max(least, -(-len(rows) // 2))])
    return [name for row, name in enumerate(scores.names) if row in kept]


__all__ = [
    "MOST_GROUPS",
    "SHRINKAGE",
    "SMALLEST_GROUP",
    "Plan",
    "Scores",
    "cheapest",
    "closest",
    "plans_by_group",
    "survivors",
    "within",
]
