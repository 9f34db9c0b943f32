"""The goal of tuning, and the plans that meet it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...core.methods.registry import get_method
from ...core.settings import is_budget, is_number
from .candidates import budget_ladder
from .choosing import Plan, Scores, cheapest, closest, plans_by_group, within

PRESENT, COMMON, RULES, DYNAMIC = "present section", "one for all", "by question", "dynamic count"
DEFAULT_BUDGET = 0.1


@dataclasses.dataclass(frozen=True)
class Goal:
    """The goal of tuning; see the arguments of [`tune`].

    Raises:
        ValueError: Values that are out of range or contradict each other.
    """

    budget: int | float | None = None
    average: int | float | None = None
    agreement: float | None = None
    frontier: bool = False
    dynamic: bool = False
    by_question: bool = False

    def __post_init__(self) -> None:
        asked = [name for name in ("budget", "average", "agreement") if getattr(self, name) is not None]
        asked += ["frontier"] * self.frontier
        if len(asked) > 1:
            raise ValueError(f"Tuning has one goal, got {' and '.join(asked)}: name one of them.")
        for name in ("budget", "average"):
            value = getattr(self, name)
            if not is_budget(value):
                raise ValueError(f"{name} must be an int >= 1 or a float in (0, 1], got {value!r}.")
        share = self.agreement
        if share is not None and not (is_number(share) and 0 < share <= 1):
            raise ValueError(f"agreement must be a share of the answers in (0, 1], got {share!r}.")
        if self.dynamic and (self.average is None or self.by_question):
            raise ValueError("A dynamic count needs average, the mean that it must have, and no rules by question.")

    def fixed(self, config: Any) -> int | float:
        """The budget that is asked for, or the present section's."""
        present = config.token_recovery.budget
        given = self.average if self.budget is None else self.budget
        return given if given is not None else DEFAULT_BUDGET if present is None else present

    def budgets(self, config: Any) -> tuple[int | float, ...]:
        """Budgets at which settings are measured."""
        if self.agreement is not None or self.frontier:
            return budget_ladder(config)
        if self.average is not None and self.by_question:
            return tuple(dict.fromkeys((*budget_ladder(config), self.average)))
        return (self.fixed(config),)

    def present_fields(self, config: Any) -> dict[str, Any]:
        """The present section with the budget that is asked for, where its method takes one."""
        section = config.token_recovery
        takes_budget = get_method(section.method).budget != "none"
        fields: dict[str, Any] = {"enabled": True}
        if takes_budget and self.agreement is None and not self.frontier and section.budget != self.fixed(config):
            fields["budget"] = self.fixed(config)
        return dict(section.replace(fields).overridable())

    def contenders(
        self,
        scores: Scores,
        groups: Sequence[str],
        folds: npt.NDArray[np.bool_],
        budgets: Mapping[str, int | float],
        config: Any,
    ) -> dict[str, Plan]:
        """The plans that meet the goal best, by what they are.

        Args:
            scores: Measurements of the candidates.
            groups: Each question's group.
            folds: (Q,) bool, half of the questions; both halves have no image in common.
            budgets: Each candidate's budget.
            config: The model's config.
        """
        families: dict[int | float, list[str]] = {}
        for name in scores.names:
            families.setdefault(budgets[name], []).append(name)

        def one_for_all(scores: Scores, _: Sequence[str]) -> list[Plan]:
            return [closest(scores.some(names)) for names in families.values()]

        if self.agreement is not None:
            found = {COMMON: cheapest(one_for_all, scores, groups, folds, self.agreement)}
            if self.by_question:
                by_group = functools.partial(plans_by_group, common=found[COMMON].common)
                found[RULES] = cheapest(by_group, scores, groups, folds, self.agreement)
        elif self.frontier:
            found = {f"{COMMON}, budget {budgets[plan.common]}": plan for plan in one_for_all(scores, groups)}
        else:
            found = {COMMON: closest(scores.some(families[self.fixed(config)]))}
        if self.by_question and self.agreement is None:
            for name, plan in list(found.items()):
                tokens = scores.of_plan(plan, groups).tokens.mean()  # the rules may read as many
                plans = plans_by_group(scores, groups, plan.common)
                found[name.replace(COMMON, RULES)] = within(plans, scores, groups, tokens)
        return {name: plan for name, plan in found.items() if plan.groups or not name.startswith(RULES)}


__all__ = ["COMMON", "DEFAULT_BUDGET", "DYNAMIC", "PRESENT", "RULES", "Goal"]
