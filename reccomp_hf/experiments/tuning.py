"""The worth of tuning on a demo model: accuracy of the chosen settings on other scenes than those of the choice.

`python -m reccomp_hf.experiments.tuning demo` chooses on validation scenes without answers, by the same functions as
`reccomp-hf tune`, asks the held-out questions in full, and prints the table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..checkpoints.loading import load
from ..cli.output import say
from ..demo import VALIDATION_SEEDS
from ..measure.evaluation.report import EvaluationReport
from ..measure.evaluation.samples import Sample, demo_samples
from ..measure.evaluation.settings import parse_setting
from ..measure.tables import markdown_table
from ..measure.tuning.candidates import FEW, budget_ladder, candidate_settings
from ..measure.tuning.choosing import Plan, Scores
from ..measure.tuning.goal import COMMON, RULES, Goal
from ..measure.tuning.kinds import beginnings
from ..measure.tuning.running import halves
from .kept_answers import KeptAnswers, experiment_arguments, is_right, result_of

COUNTS = (25, 50, 100, 200, 400)
REPORTED_BUDGETS = (7, 14, 22, 36)
AGREEMENT = 0.95
PUBLISHED = ("paper", "divprune", "vispruner", "scope", "cdpruner", "holov")
"""Methods with their published settings; the others are behind one of these at every budget (table of accuracy)."""
PAPER, BALANCED, HINDSIGHT = "paper", "balanced", "best published in hindsight"
ONE, KINDS, MEAN_BUDGET = "tuned", "tuned by question", "budget by question"
LABELS, ORACLE = "tuned with labels", "oracle of the candidates"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The settings that tuning compares on a demo model.

    Attributes:
        settings: Their fields by name.
        budgets: Their budgets by name.
        config: The model's config.
    """

    settings: dict[str, dict[str, Any]]
    budgets: dict[str, int | float]
    config: Any

    @classmethod
    def of(cls, model: Any) -> Candidates:
        """The candidates `few` at all budgets that are tried."""
        settings, budgets = dict[str, dict[str, Any]](), dict[str, int | float]()
        for budget in budget_ladder(model.config):
            found = candidate_settings(model, FEW, budget, {}, strict=True)
            settings |= {name: one.fields for name, one in found.items()}
            budgets |= dict.fromkeys(found, budget)
        return cls(settings, budgets, model.config)

    def at(self, budget: int | float) -> list[str]:
        """The names of those with a budget."""
        return [name for name, own in self.budgets.items() if own == budget]

    def plans(self, scores: Scores, samples: Sequence[Sample]) -> dict[str, Plan]:
        """The plans that tuning takes on these questions, by goal and way, without looking at other questions."""
        groups, folds = beginnings([sample.question for sample in samples]), halves(samples)
        found: dict[str, Plan] = {}
        for budget in REPORTED_BUDGETS:
            same = scores.some(self.at(budget))
            fixed = Goal(budget=budget, by_question=True).contenders(same, groups, folds, self.budgets, self.config)
            mean = Goal(average=budget, by_question=True).contenders(scores, groups, folds, self.budgets, self.config)
            found[f"{budget}: {ONE}"] = fixed[COMMON]
            found[f"{budget}: {KINDS}"] = fixed.get(RULES, fixed[COMMON])
            found[f"{budget}: {MEAN_BUDGET}"] = mean.get(RULES, mean[COMMON])
        return found

    def agreeing(self, scores: Scores, samples: Sequence[Sample]) -> dict[str, Plan]:
        """The plans with the fewest tokens that keep a share of the answers."""
        groups, folds = beginnings([sample.question for sample in samples]), halves(samples)
        goal = Goal(agreement=AGREEMENT, by_question=True)
        kept = goal.contenders(scores, groups, folds, self.budgets, self.config)
        ways = {ONE: kept[COMMON], MEAN_BUDGET: kept.get(RULES, kept[COMMON])}
        return {f"{AGREEMENT:.0%} agreement: {way}": plan for way, plan in ways.items()}

    def labelled(self, report: EvaluationReport, count: int) -> dict[str, Plan]:
        """The plans that the answers of the first `count` questions say are best: one setting for all."""
        right = {name: report.results[name].right[:count].mean() for name in report.results}
        best = {budget: max(self.at(budget), key=right.__getitem__) for budget in REPORTED_BUDGETS}
        return {f"{budget}: {LABELS}": Plan(name) for budget, name in best.items()}


def published_settings() -> dict[str, dict[str, Any]]:
    """Published methods at all reported budgets, by budget and method."""
    pairs = itertools.product(REPORTED_BUDGETS, PUBLISHED)
    return {f"published {name}:{budget}": parse_setting(f"{name}:{budget}").fields for budget, name in pairs}


def combined(report: EvaluationReport, plans: Mapping[str, Plan]) -> EvaluationReport:
    """The report of plans, each question answered by its own setting."""
    groups, results = beginnings(report.questions), {report.reference: report.results[report.reference]}
    for name, plan in plans.items():
        rows = [report.results[plan.setting(group)] for group in groups]
        fields = ("answers", "right", "tokens")
        columns = [[getattr(row, field)[number] for number, row in enumerate(rows)] for field in fields]
        results[name] = result_of(name, *columns)
    return EvaluationReport(report.questions, report.kinds, report.pictures, results, report.reference)


def with_bounds(both: EvaluationReport, report: EvaluationReport, candidates: Candidates) -> EvaluationReport:
    """Add what looks at the answers of the reported questions: the best published method, and the candidates' oracle.

    The oracle answers a question right if one of the candidates of a budget does.
    """
    results = dict(both.results)
    for budget in REPORTED_BUDGETS:
        published = [f"published {name}:{budget}" for name in PUBLISHED]
        results[f"{budget}: {PAPER}"] = report.results[published[PUBLISHED.index(PAPER)]]
        best = max(published, key=lambda name: report.accuracy(name).value)
        results[f"{budget}: {HINDSIGHT}"] = report.results[best]
        rows = [report.results[name] for name in candidates.at(budget)]
        right = np.stack([row.right for row in rows])
        answers = [rows[first].answers[number] for number, first in enumerate(right.argmax(0))]
        results[f"{budget}: {ORACLE}"] = result_of(ORACLE, answers, right.any(0), rows[0].tokens)
    return dataclasses.replace(both, results=results)


def first_words(report: EvaluationReport, samples: Sequence[Sample]) -> EvaluationReport:
    """The report of the first words of the answers."""
    results = {}
    for name, result in report.results.items():
        answers = [(answer.split() or [""])[0] for answer in result.answers]
        results[name] = result_of(name, answers, is_right(samples, answers), result.tokens)
    return dataclasses.replace(report, results=results)


def run(name: str, count: int, questions: int, path: str | None = None) -> str:
    """The table of a model, as Markdown.

    Args:
        name: A demo model.
        count: Number of validation questions on which settings are chosen; fewer of `COUNTS` are tried too.
        questions: Number of held-out questions.
        path: File that keeps what was measured, see [`KeptAnswers`].
    """
    kept = KeptAnswers(*load(name, {}), path)
    candidates = Candidates.of(kept.model)
    chosen_on = demo_samples(count, seeds=VALIDATION_SEEDS)
    scores = kept.scores(chosen_on, candidates.settings)
    reported = {name: candidates.settings[name] for budget in REPORTED_BUDGETS for name in candidates.at(budget)}
    labelled = kept.report(chosen_on, reported)
    plans = {(f"{budget}: {BALANCED}", 0): Plan(f"{BALANCED}:{budget}") for budget in REPORTED_BUDGETS}
    for some in (*(some for some in COUNTS if some < count), count):
        first = scores.questions(np.arange(count) < some), chosen_on[:some]
        taken = candidates.plans(*first) | candidates.agreeing(*first) | candidates.labelled(labelled, some)
        plans |= {(way, some): plan for way, plan in taken.items()}
    used = {name: candidates.settings[name] for plan in plans.values() for name in plan.settings}
    samples = demo_samples(questions)
    report = kept.report(samples, {**reported, **used, **published_settings()})
    note = f"{len(candidates.settings)} settings were measured on {count} questions."
    return f"{table(report, samples, plans, candidates)}\n\n{note}"


def table(
    report: EvaluationReport, samples: Sequence[Sample], plans: Mapping[tuple[str, int], Plan], candidates: Candidates
) -> str:
    """Accuracies, tokens and agreements of plans, a row each."""
    both = combined(report, {f"{name} {count}": plan for (name, count), plan in plans.items()})
    both = with_bounds(both, report, candidates)
    first = first_words(both, samples)
    bounds = {(f"{budget}: {way}", 0): way for budget in REPORTED_BUDGETS for way in (PAPER, HINDSIGHT, ORACLE)}
    rows = [["", "chosen on", "visual tokens", "accuracy", "minus balanced", "first words", "agreement"]]
    for way, count in sorted({**plans, **bounds}, key=lambda key: (key[0].partition(":")[0].zfill(20), key[1])):
        own, base = way if (way, count) in bounds else f"{way} {count}", f"{way.partition(':')[0]}: {BALANCED} 0"
        difference = str(both.difference(own, base)) if own != base and base in both.results else "-"
        tokens = f"{both.results[own].tokens.mean():.1f}"
        cells = [tokens, str(both.accuracy(own)), difference, str(first.accuracy(own)), str(both.agreement(own))]
        label = f"{way} ({both.results[own].name.removeprefix('published ')})" if way.endswith(HINDSIGHT) else way
        rows.append([label, str(count or "-"), *cells])
    off = both.reference
    rows.append(["uncompressed", "-", "-", str(both.accuracy(off)), "-", str(first.accuracy(off)), "-"])
    return "\n".join(markdown_table(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = experiment_arguments("Chooses settings on validation scenes, and reports their accuracy.", 2000, arguments)
    say(run(given.model, given.chosen_on, given.questions, given.keep))


__all__ = ["Candidates", "combined", "first_words", "published_settings", "run", "table", "with_bounds"]

if __name__ == "__main__":
    main()
