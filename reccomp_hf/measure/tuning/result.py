"""The result of tuning: the section, what it was chosen from, and how it does on questions it was not chosen on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ... import __version__
from ...core.methods.contract import METHOD_FIELDS
from ..intervals import Draws, Interval
from ..tables import markdown_table
from .choosing import Plan, Scores
from .goal import DYNAMIC, PRESENT, RULES, Goal

MEASURE = "Jensen-Shannon divergence from the uncompressed model, in bits"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A plan on the reported questions.

    Attributes:
        plan: Which setting reads which question.
        tokens: Mean visual tokens of a question.
        spread: The 10 % and 90 % quantiles of the visual tokens.
        divergence: Mean divergence in bits with its interval, see [`Measurement`].
        agreement: Share of answers that equal the uncompressed model's, with its interval.
        difference: Divergence minus that of the present section, paired, with its interval.
    """

    plan: Plan
    tokens: float
    spread: tuple[float, float]
    divergence: Interval
    agreement: Interval
    difference: Interval


@dataclasses.dataclass
class Tuning:
    """A tuned section and its evidence.

    Attributes:
        goal: The goal.
        section: Fields of `token_recovery`, rules included; `None` where only a curve was asked for.
        chosen: Name of the contender that the section is.
        reason: A sentence that says why.
        contenders: Contenders by name, the present section first, on the reported questions.
        chosen_on: Number of questions on which settings were chosen.
        reported_on: Number of other questions, on which the contenders were measured.
        scores: Measurements of the candidates on the first ones; `None` for a dynamic count.
        budgets: The candidates' budgets.
    """

    goal: Goal
    section: dict[str, Any] | None
    chosen: str | None
    reason: str
    contenders: dict[str, Contender]
    chosen_on: int
    reported_on: int
    scores: Scores | None = None
    budgets: dict[str, int | float] = dataclasses.field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the section is another one than the present one."""
        return self.chosen not in (None, PRESENT)

    def record(self) -> dict[str, Any]:
        """The contents of a checkpoint's `tuning.json`, as JSON values."""
        asked = {name: value for name, value in dataclasses.asdict(self.goal).items() if value}
        return {
            "reccomp_hf": __version__,
            "asked": asked,
            "measure": MEASURE,
            "chosen_on": self.chosen_on,
            "reported_on": self.reported_on,
            "chosen": self.chosen,
            "reason": self.reason,
            "contenders": {name: dataclasses.asdict(contender) for name, contender in self.contenders.items()},
        }

    def to_json(self) -> str:
        """The section file: the section under `token_recovery`, and the record under `tuning`."""
        fields = {} if self.section is None else {"token_recovery": self.section}
        return json.dumps({**fields, "tuning": self.record()}, indent=2) + "\n"

    def markdown(self) -> str:
        """A table of the contenders, and the reason of the choice."""
        rows = [["", "setting", "visual tokens", "divergence", "agreement", "divergence minus present"]]
        for name, contender in self.contenders.items():
            low, high = contender.spread
            spread = "" if low == high else f" ({low:.0f} to {high:.0f})"
            cells = [contender.plan.common, f"{contender.tokens:.1f}{spread}", str(contender.divergence)]
            difference = "-" if name == PRESENT else contender.difference.signed()
            rows.append([name, *cells, str(contender.agreement), difference])
        lines = markdown_table(rows)
        for name, contender in self.contenders.items():
            if contender.plan.groups and name == (self.chosen if self.changed else RULES):
                rows = [["questions that begin with", "setting"]]
                rows += [[group, setting] for group, setting in contender.plan.groups.items()]
                lines += ["", *markdown_table([*rows, ["all others", contender.plan.common]])]
        return "\n".join([*lines, "", self.reason])


def contenders_of(
    plans: Mapping[str, Plan], scores: Scores, groups: Sequence[str], draws: Draws
) -> dict[str, Contender]:
    """Compare plans with the first of them, on draws of images that all share.

    Args:
        plans: The plans by name, the present section first.
        scores: Measurements of all settings in them.
        groups: Each question's group.
        draws: Draws of the questions' images.
    """
    of = {name: scores.of_plan(plan, groups) for name, plan in plans.items()}
    present = next(iter(of.values()))
    found = {}
    for name, own in of.items():
        low, high = np.quantile(own.tokens, (0.1, 0.9)).tolist()
        found[name] = Contender(
            plan=plans[name],
            tokens=float(own.tokens.mean()),
            spread=(low, high),
            divergence=draws.mean(own.divergence[0]),
            agreement=draws.mean(own.agrees[0]),
            difference=draws.mean((own.divergence - present.divergence)[0]),
        )
    return found


def decide(
    goal: Goal, contenders: Mapping[str, Contender], scores: Scores, groups: Sequence[str], draws: Draws
) -> tuple[str | None, str]:
    """The contender to take, and the reason; arguments as of and from [`contenders_of`]."""
    if goal.frontier:
        return None, "The best setting of every budget; the section was not changed."
    if goal.dynamic:
        return DYNAMIC, "The dynamic count was asked for; at the same mean a fixed budget usually does better."
    if goal.agreement is not None:
        return _keeps_answers(goal.agreement, contenders)
    divergence = {name: scores.of_plan(one.plan, groups).divergence[0] for name, one in contenders.items()}
    holder, steps = PRESENT, []
    for name in divergence:
        if name == holder:
            continue
        difference = draws.mean(divergence[name] - divergence[holder])
        better = difference.high < 0
        verdict = "is closer to the uncompressed model than" if better else "is not shown to be closer than"
        steps.append(f"{name!r} {verdict} {holder!r} (difference {difference.signed()})")
        holder = name if better else holder
    taken = f"{PRESENT!r} is kept" if holder == PRESENT else f"{holder!r} is taken"
    return holder, f"{'; '.join(steps)}: {taken}."


def _keeps_answers(share: float, contenders: Mapping[str, Contender]) -> tuple[str, str]:
    """The contender with the fewest tokens whose agreement's interval reaches the share."""
    fitting = {name: one for name, one in contenders.items() if one.agreement.high >= share}
    if not fitting:
        best = max(contenders, key=lambda name: contenders[name].agreement.value)
        return PRESENT, (
            f"No contender keeps {share:g} of the answers: {best!r} keeps {contenders[best].agreement} with "
            f"{contenders[best].tokens:.1f} tokens. {PRESENT!r} is kept."
        )
    name = min(fitting, key=lambda name: fitting[name].tokens)
    taken = "is kept" if name == PRESENT else "is taken"
    return name, (
        f"{name!r} {taken}: of the contenders that keep {share:g} of the answers within their interval it reads the "
        f"fewest visual tokens, {fitting[name].tokens:.1f}, and keeps {fitting[name].agreement}."
    )


def section_of(plan: Plan, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a plan's section: those of its common setting, with a rule for every other setting."""
    common = dict(settings[plan.common])
    rules: dict[str, dict[str, Any]] = {}
    for group, name in plan.groups.items():
        fields = settings[name]
        # Another method would bring its own defaults of some fields and no options, so these are written too.
        needed = () if fields["method"] == common["method"] else (*METHOD_FIELDS, "method_options")
        kept = {field: value for field, value in common.items() if field not in needed or value == {}}
        changed = {field: value for field, value in fields.items() if field not in kept or value != kept[field]}
        rules.setdefault(name, {"begins": [], **changed})["begins"].append(group)
    return {**common, **({"rules": list(rules.values())} if rules else {})}


__all__ = ["Contender", "Tuning", "contenders_of", "decide", "section_of"]
