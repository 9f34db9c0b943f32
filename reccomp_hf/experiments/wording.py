"""Rules by question where the wording varies, and for kinds of questions that were not in the tuning data.

`python -m reccomp_hf.experiments.wording demo` chooses settings on validation scenes and prints two tables on held-out
ones: questions in six wordings each, of which the model was trained on the first alone, and each kind of question with
settings that were chosen without it. Agreement is that with the model's own uncompressed answer to the same wording.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..checkpoints.loading import load
from ..cli.output import say
from ..demo import VALIDATION_SEEDS
from ..measure.evaluation.report import EvaluationReport
from ..measure.evaluation.samples import Sample, demo_samples
from ..measure.tables import markdown_table
from ..measure.tuning.choosing import Plan, Scores
from .kept_answers import KeptAnswers, experiment_arguments
from .tuning import BALANCED, MEAN_BUDGET, ONE, REPORTED_BUDGETS, Candidates, combined

WORDINGS = {
    "color": (
        "What color is the {}?",
        "What color does the {} have?",
        "The {} is what color?",
        "What is the color of the {}?",
        "Which color is the {}?",
        "Tell me the color of the {}.",
    ),
    "shape": (
        "What shape is the {}?",
        "What shape does the {} have?",
        "The {} is what shape?",
        "What is the shape of the {}?",
        "Which shape is the {}?",
        "Tell me the shape of the {}.",
    ),
    "exist": (
        "Is there {}?",
        "Is {} there?",
        "There is {}?",
        "Do you see {}?",
        "Can you see {}?",
        "Tell me, is there {}?",
    ),
    "count": (
        "How many objects are there?",
        "There are how many objects?",
        "What is the number of objects?",
        "Count the objects.",
        "The objects are how many?",
        "Tell me how many objects there are.",
    ),
    "read": (
        "What letter is on the {}?",
        "What letter does the {} have?",
        "The {} has what letter?",
        "What is the letter on the {}?",
        "Which letter is on the {}?",
        "Tell me the letter on the {}.",
    ),
}
"""Six wordings of each of the demo's questions, the demo's own first; braces stand for what is asked about."""
PLAIN, REWORDED = "in one wording", "in six wordings"


def reworded(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The demo's questions, each in one of six wordings at random.

    Args:
        samples: Questions of `demo_samples`.
        seed: Seed of the choice.
    """
    draws, found = np.random.default_rng(seed), []
    for sample in samples:
        own, *_ = wordings = WORDINGS[sample.kind]
        match = re.fullmatch(re.escape(own).replace(r"\{\}", "(.+)"), sample.question)
        if match is None:
            raise ValueError(f"A question about {sample.kind} must read {own!r}, got {sample.question!r}.")
        found.append(dataclasses.replace(sample, question=draws.choice(wordings).format(*match.groups())))
    return found


def run(name: str, count: int, questions: int, path: str | None = None) -> str:
    """Both tables of a model, as Markdown.

    Args:
        name: A demo model.
        count: Number of validation questions on which settings are chosen.
        questions: Number of held-out questions.
        path: File that keeps what was measured, see [`KeptAnswers`].
    """
    kept = KeptAnswers(*load(name, {}), path)
    candidates = Candidates.of(kept.model)
    plain, held_out = demo_samples(count, seeds=VALIDATION_SEEDS), demo_samples(questions)
    varied, asked = reworded(plain, 0), reworded(held_out, 1)
    chosen_on = {PLAIN: plain, REWORDED: varied}
    scores = {way: kept.scores(samples, candidates.settings) for way, samples in chosen_on.items()}
    taken = {way: candidates.plans(scores[way], samples) for way, samples in chosen_on.items()}
    without = {kind: plans_without(kind, candidates, scores[PLAIN], plain) for kind in WORDINGS}

    plans = {f"{budget}: {BALANCED}": Plan(f"{BALANCED}:{budget}") for budget in REPORTED_BUDGETS}
    first = dict(plans)
    for way, found in taken.items():
        first |= {f"{label}, chosen {way}": plan for label, plan in found.items()}
    second = {f"{label}, chosen {PLAIN}": plan for label, plan in taken[PLAIN].items()}
    used = [*first.values(), *second.values(), *(plan for found in without.values() for plan in found.values())]
    settings = {name: candidates.settings[name] for plan in used for name in plan.settings}
    return "\n\n".join(
        [
            wording_table(kept.report(asked, settings), first),
            kinds_table(kept.report(held_out, settings), {**plans, **taken[PLAIN]}, without),
        ]
    )


def plans_without(kind: str, candidates: Candidates, scores: Scores, samples: Sequence[Sample]) -> dict[str, Plan]:
    """The plans that tuning takes without the questions of one kind."""
    others = np.array([sample.kind != kind for sample in samples])
    return candidates.plans(scores.questions(others), [sample for sample in samples if sample.kind != kind])


def wording_table(report: EvaluationReport, plans: Mapping[str, Plan]) -> str:
    """Accuracy, agreement and tokens of plans on reworded questions."""
    both = combined(report, plans)
    rows = [["questions in six wordings", "visual tokens", "accuracy", "minus balanced", "agreement"]]
    for name in sorted(plans, key=lambda name: int(name.partition(":")[0])):
        base = f"{name.partition(':')[0]}: {BALANCED}"
        difference = "-" if name == base else str(both.difference(name, base))
        tokens = f"{both.results[name].tokens.mean():.1f}"
        rows.append([name, tokens, str(both.accuracy(name)), difference, str(both.agreement(name))])
    rows.append(["uncompressed", "-", str(both.accuracy(both.reference)), "-", "-"])
    return "\n".join(markdown_table(rows))


def kinds_table(report: EvaluationReport, plans: Mapping[str, Plan], without: Mapping[str, Mapping[str, Plan]]) -> str:
    """Accuracy on each kind of question: with settings that were chosen without it, and with it.

    Args:
        report: Answers to the demo's own questions.
        plans: Plans that were chosen on all kinds.
        without: Plans that were chosen without a kind, by the kind.
    """
    rows = [["kind that was left out", BALANCED, f"{ONE} without it", f"{MEAN_BUDGET} without it", "tokens"]]
    rows[0] += ["minus balanced", f"{MEAN_BUDGET} with it", "tokens"]
    for budget in REPORTED_BUDGETS:
        for kind, found in without.items():
            ways = {
                "balanced": plans[f"{budget}: {BALANCED}"],
                "one": found[f"{budget}: {ONE}"],
                "without": found[f"{budget}: {MEAN_BUDGET}"],
                "with": plans[f"{budget}: {MEAN_BUDGET}"],
            }
            both = combined(report, ways)
            of_kind = np.array([own == kind for own in report.kinds])
            tokens = {way: f"{both.results[way].tokens[of_kind].mean():.1f}" for way in ways}
            shares = {way: f"{both.accuracy(way, kind).value:.3f}" for way in ways}
            difference = str(both.difference("without", "balanced", kind))
            row = [f"{budget}: {kind}", shares["balanced"], shares["one"], shares["without"], tokens["without"]]
            rows.append([*row, difference, shares["with"], tokens["with"]])
    return "\n".join(markdown_table(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = experiment_arguments("Measures rules by question on reworded questions and unseen kinds.", 1200, arguments)
    say(run(given.model, given.chosen_on, given.questions, given.keep))


__all__ = ["WORDINGS", "kinds_table", "plans_without", "reworded", "run", "wording_table"]

if __name__ == "__main__":
    main()
