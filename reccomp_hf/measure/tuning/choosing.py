"""Choosing settings from measurements: one for all questions, or one for each kind of question."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .measuring import Measurement

SHRINKAGE = 10
"""A group's mean counts as if this many more questions had the common mean."""
SMALLEST_GROUP = 5
"""Questions of smaller groups keep the common setting."""
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
    def of(cls, measured: dict[str, Sequence[Measurement]]) -> Scores:
        """Scores of measurements by setting, all on the same questions."""
        rows = [[dataclasses.astuple(one) for one in measurements] for measurements in measured.values()]
        values = np.array(rows, dtype=float)
        return cls(tuple(measured), values[..., 0], values[..., 1], values[..., 2])

    def of_plan(self, plan: Plan, groups: Sequence[str]) -> Scores:
        """The scores (1, Q) of a plan, given each question's group."""
        rows = np.array([self.names.index(plan.setting(group)) for group in groups])
        picked = (values[rows, np.arange(len(rows))][None] for values in (self.divergence, self.agrees, self.tokens))
        return Scores(("plan",), *picked)

    def some(self, names: Iterable[str]) -> Scores:
        """The scores of some of the settings."""
        rows = [self.names.index(name) for name in names]
        values = (self.divergence[rows], self.agrees[rows], self.tokens[rows])
        return Scores(tuple(self.names[row] for row in rows), *values)


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


def common_plans(scores: Scores) -> list[Plan]:
    """One setting for all questions: those that no setting beats with as few tokens, from the fewest tokens up."""
    tokens, divergence = scores.tokens.mean(1), scores.divergence.mean(1)
    plans: list[Plan] = []
    best = np.inf
    for row in np.lexsort((divergence, tokens)):
        if divergence[row] < best:
            best = divergence[row]
            plans.append(Plan(scores.names[row]))
    return plans


def plans_by_group(scores: Scores, groups: Sequence[str]) -> list[Plan]:
    """A setting for each group of questions, from the fewest mean tokens up.

    A group's mean divergence is shrunk toward the mean of all questions. Each plan is best at some price of a token:
    then no other plan has both fewer tokens and a smaller divergence by these means.

    Args:
        scores: The measurements.
        groups: Each question's group.
    """
    keys, index, sizes = np.unique(list(groups), return_inverse=True, return_counts=True)
    members = np.eye(len(keys))[index]  # (Q, G)
    large = sizes >= SMALLEST_GROUP
    means = {name: getattr(scores, name).mean(1) for name in ("divergence", "tokens")}
    shrunk = (scores.divergence @ members + SHRINKAGE * means["divergence"][:, None]) / (sizes + SHRINKAGE)
    tokens = scores.tokens @ members / sizes
    plans: dict[tuple[Any, ...], Plan] = {}
    for price in _PRICES:
        common = scores.names[int(np.argmin(means["divergence"] + price * means["tokens"]))]
        best = np.argmin(shrunk + price * tokens, axis=0)
        chosen = {str(key): scores.names[row] for key, row in zip(keys[large], best[large], strict=True)}
        plan = Plan(common, {key: name for key, name in chosen.items() if name != common})
        plans.setdefault((common, tuple(plan.groups.items())), plan)
    return sorted(plans.values(), key=lambda plan: scores.of_plan(plan, groups).tokens.mean())


def closest(scores: Scores) -> Plan:
    """The setting with the smallest mean divergence, for all questions."""
    return Plan(scores.names[int(np.argmin(scores.divergence.mean(1)))])


def within(plans: Sequence[Plan], scores: Scores, groups: Sequence[str], tokens: float) -> Plan:
    """The plan with the smallest divergence among those of at most so many tokens on average, else the smallest."""
    fitting = [plan for plan in plans if _mean(scores, plan, groups, "tokens") <= tokens + 1e-6] or plans[:1]
    return min(fitting, key=lambda plan: _mean(scores, plan, groups, "divergence"))


def cheapest(plans: Sequence[Plan], scores: Scores, groups: Sequence[str], agreement: float) -> Plan:
    """The plan with the fewest tokens among those that keep a share of the answers, else the one that keeps most."""
    fitting = [plan for plan in plans if _mean(scores, plan, groups, "agrees") >= agreement]
    if not fitting:
        return max(plans, key=lambda plan: _mean(scores, plan, groups, "agrees"))
    return min(fitting, key=lambda plan: _mean(scores, plan, groups, "tokens"))


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


def _mean(scores: Scores, plan: Plan, groups: Sequence[str], field: str) -> float:
    return float(getattr(scores.of_plan(plan, groups), field).mean())


__all__ = [
    "SHRINKAGE",
    "SMALLEST_GROUP",
    "Plan",
    "Scores",
    "cheapest",
    "closest",
    "common_plans",
    "plans_by_group",
    "survivors",
    "within",
]
