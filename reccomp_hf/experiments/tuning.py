"""What tuning is worth on a demo model: accuracy of the chosen settings on other scenes than those of the choice.

`python -m reccomp_hf.experiments.tuning demo` chooses on validation scenes without answers, by the same functions as
`reccomp-hf tune`, asks the held-out questions in full, and prints the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..checkpoints.loading import load
from ..cli.output import say
from ..data.progress import progress_bar
from ..demo import CHECKPOINTS, VALIDATION_SEEDS
from ..measure.evaluation.report import EvaluationReport, SettingResult
from ..measure.evaluation.running import evaluate
from ..measure.evaluation.samples import Sample, demo_samples
from ..measure.evaluation.settings import OFF, Setting, parse_setting
from ..measure.tables import markdown_table
from ..measure.tuning.candidates import FEW, budget_ladder, candidate_settings
from ..measure.tuning.choosing import Plan, Scores
from ..measure.tuning.goal import COMMON, RULES, Goal
from ..measure.tuning.kinds import beginnings
from ..measure.tuning.measuring import Measurement, measure
from ..measure.tuning.running import halves

COUNTS = (100, 200, 400)
REPORTED_BUDGETS = (7, 14, 22, 36)
AGREEMENT = 0.95
_BATCH = 50
_NEW_TOKENS = 8
BALANCED, ONE, KINDS, MEAN_BUDGET = "balanced", "tuned", "tuned by question", "budget by question"


def measured(
    model: Any, processor: Any, samples: Sequence[Sample], settings: Mapping[str, Mapping[str, Any]]
) -> Scores:
    """Scores of settings on questions, see [`measure`]."""
    found: dict[str, list[Measurement]] = {name: [] for name in settings}
    with progress_bar(len(samples), "measure") as bar:
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            for name, rows in measure(model, processor, batch, settings, _NEW_TOKENS).items():
                found[name] += rows
            bar.update(len(batch))
    return Scores.of(found)


def plans_of(
    scores: Scores, samples: Sequence[Sample], budgets: Mapping[str, int | float], config: Any
) -> dict[str, Plan]:
    """The plans that tuning takes on these questions, by goal and way, without looking at other questions."""
    groups, folds = beginnings([sample.question for sample in samples]), halves(samples)
    found: dict[str, Plan] = {}
    for budget in REPORTED_BUDGETS:
        same = scores.some([name for name in scores.names if budgets[name] == budget])
        fixed = Goal(budget=budget, by_question=True).contenders(same, groups, folds, budgets, config)
        mean = Goal(average=budget, by_question=True).contenders(scores, groups, folds, budgets, config)
        found[f"{budget}: {ONE}"] = fixed[COMMON]
        found[f"{budget}: {KINDS}"] = fixed.get(RULES, fixed[COMMON])
        found[f"{budget}: {MEAN_BUDGET}"] = mean.get(RULES, mean[COMMON])
    kept = Goal(agreement=AGREEMENT, by_question=True).contenders(scores, groups, folds, budgets, config)
    found[f"{AGREEMENT:.0%} agreement: {ONE}"] = kept[COMMON]
    found[f"{AGREEMENT:.0%} agreement: {MEAN_BUDGET}"] = kept.get(RULES, kept[COMMON])
    return found


def combined(report: EvaluationReport, plans: Mapping[str, Plan]) -> EvaluationReport:
    """The report of plans, each question answered by its own setting."""
    groups, off = beginnings(report.questions), report.results[report.reference]
    results = {report.reference: off}
    for name, plan in plans.items():
        rows = [report.results[plan.setting(group)] for group in groups]
        numbers = range(len(rows))
        results[name] = SettingResult(
            name=name,
            fields={},
            answers=[rows[number].answers[number] for number in numbers],
            right=np.array([rows[number].right[number] for number in numbers]),
            tokens=np.array([rows[number].tokens[number] for number in numbers]),
            seconds_per_sample=float("nan"),
            object_recall=np.full(len(rows), np.nan),
            object_precision=np.full(len(rows), np.nan),
        )
    return EvaluationReport(report.questions, report.kinds, report.pictures, results, report.reference)


def run(name: str, count: int, questions: int) -> str:
    """The table of a model, as Markdown.

    Args:
        name: A demo model.
        count: Number of validation questions on which settings are chosen, `COUNTS` of them and all.
        questions: Number of held-out questions.
    """
    model, processor = load(name, {})
    settings, budgets = dict[str, dict[str, Any]](), dict[str, int | float]()
    for budget in budget_ladder(model.config):
        found = candidate_settings(model, FEW, budget, {}, strict=True)
        settings |= {setting: one.fields for setting, one in found.items()}
        budgets |= dict.fromkeys(found, budget)
    chosen_on, began = demo_samples(count, seeds=VALIDATION_SEEDS), time.perf_counter()
    scores = measured(model, processor, chosen_on, settings)
    minutes = (time.perf_counter() - began) / 60
    plans = {(f"{budget}: {BALANCED}", 0): Plan(f"{BALANCED}:{budget}") for budget in REPORTED_BUDGETS}
    for some in (*(some for some in COUNTS if some < count), count):
        first = scores.questions(np.arange(count) < some)
        taken = plans_of(first, chosen_on[:some], budgets, model.config)
        plans |= {(name, some): plan for name, plan in taken.items()}
    used = dict.fromkeys(setting for plan in plans.values() for setting in plan.settings)
    wanted = [parse_setting(OFF), *(Setting(setting, settings[setting]) for setting in used)]
    report = evaluate(model, processor, demo_samples(questions), wanted, max_new_tokens=_NEW_TOKENS)
    note = f"{len(settings)} settings were measured on {count} questions in {minutes:.1f} minutes."
    return f"{table(report, plans)}\n\n{note}"


def table(report: EvaluationReport, plans: Mapping[tuple[str, int], Plan]) -> str:
    """The accuracies, tokens and agreements of plans, a row each."""
    both = combined(report, {f"{name} {count}": plan for (name, count), plan in plans.items()})
    rows = [["", "chosen on", "visual tokens", "accuracy", "minus balanced", "agreement"]]
    for name, count in sorted(plans, key=lambda key: (key[0].partition(":")[0].zfill(20), key[1])):
        own, base = f"{name} {count}", f"{name.partition(':')[0]}: {BALANCED} 0"
        difference = str(both.difference(own, base)) if count and base in both.results else "-"
        tokens = f"{both.results[own].tokens.mean():.1f}"
        cells = [tokens, str(both.accuracy(own)), difference, str(both.agreement(own))]
        rows.append([name, str(count or "-"), *cells])
    rows.append(["uncompressed", "-", "-", str(both.accuracy(both.reference)), "-", "-"])
    return "\n".join(markdown_table(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Chooses settings on validation scenes, and reports their accuracy.")
    parser.add_argument("model", choices=CHECKPOINTS)
    parser.add_argument("--chosen-on", type=int, default=400, metavar="N", help="validation questions")
    parser.add_argument("--questions", type=int, default=2000, metavar="N", help="held-out questions")
    given = parser.parse_args(arguments)
    say(run(given.model, given.chosen_on, given.questions))


__all__ = ["combined", "measured", "plans_of", "run", "table"]

if __name__ == "__main__":
    main()
