"""What tuning is asked for, and the plans that meet it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.methods.registry import get_method
from .candidates import budget_ladder
from .choosing import Plan, Scores, cheapest, closest, common_plans, plans_by_group, within

PRESENT, COMMON, RULES, DYNAMIC = "present section", "one for all", "by question", "dynamic count"
DEFAULT_BUDGET = 0.1


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a section is tuned for; see the arguments of [`tune`].

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
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not whole and not (isinstance(value, float) and 0 < value <= 1):
                raise ValueError(f"{name} must be an int >= 1 or a float in (0, 1], got {value!r}.")
        share = self.agreement
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
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
        self, scores: Scores, groups: Sequence[str], budgets: Mapping[str, int | float], config: Any
    ) -> dict[str, Plan]:
        """The plans that meet the goal best, by what they are.

        Args:
            scores: Measurements of the candidates.
            groups: Each question's group.
            budgets: Each candidate's budget.
            config: The model's config.
        """
        if self.frontier:
            return self._curve(scores, groups, budgets)
        if self.agreement is None:
            at_budget = [name for name in scores.names if budgets[name] == self.fixed(config)]
            found = {COMMON: closest(scores.some(at_budget))}
        else:
            found = {COMMON: cheapest(common_plans(scores), scores, groups, self.agreement)}
        if self.by_question:
            plans = plans_by_group(scores, groups)
            if self.agreement is None:
                found[RULES] = within(plans, scores, groups, scores.of_plan(found[COMMON], groups).tokens.mean())
            else:
                found[RULES] = cheapest(plans, scores, groups, self.agreement)
            if not found[RULES].groups:  # one setting for all is the best
                del found[RULES]
        return found

    def _curve(self, scores: Scores, groups: Sequence[str], budgets: Mapping[str, int | float]) -> dict[str, Plan]:
        """The best plan of every budget, one for all and by question."""
        found: dict[str, Plan] = {}
        plans = plans_by_group(scores, groups) if self.by_question else []
        for budget in dict.fromkeys(budgets.values()):
            best = closest(scores.some([name for name in scores.names if budgets[name] == budget]))
            found[f"{COMMON}, budget {budget}"] = best
            if plans:
                tokens = scores.of_plan(best, groups).tokens.mean()
                found[f"{RULES}, budget {budget}"] = within(plans, scores, groups, tokens)
        return found


__all__ = ["COMMON", "DEFAULT_BUDGET", "DYNAMIC", "PRESENT", "RULES", "Goal"]
