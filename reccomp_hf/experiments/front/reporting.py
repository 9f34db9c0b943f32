"""Tables and the plot of accuracy over the number of visual tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...measure.evaluation.report import EvaluationReport
from ...measure.intervals import Interval
from ...measure.tables import markdown_table
from ...measure.tuning.candidates import at_budget

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BALANCED = "balanced"
_PANELS = ("as published", "original positions, value path")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")  # Okabe and Ito
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))


def tables(first: EvaluationReport, whole: EvaluationReport, budgets: Sequence[int]) -> str:
    """Accuracies of first words and of whole answers, and `balanced` next to the best other methods, as Markdown.

    Args:
        first: The report of first words.
        whole: The report of whole answers, with the same settings.
        budgets: The numbers of tokens.
    """
    parts = [f"{len(first.questions):,} questions on {len(set(first.pictures))} scenes."]
    for title, report in (("First words", first), ("Whole answers", whole)):
        rows = [[title, *map(str, budgets)]]
        for name in names_of(report):
            cells = (report.accuracy(at_budget(name, budget)) for budget in budgets)
            rows.append([short(name), *(f"{cell.value:.3f} ±{(cell.high - cell.low) / 2:.3f}" for cell in cells)])
        parts.append("\n".join(markdown_table(rows)))
        alone = [name for name in report.results if ":" not in name]
        parts.append("; ".join(_line(report, name) for name in alone) + ".")
        rows = [[f"{title}: `{BALANCED}` minus the best", *map(str, budgets)]]
        for panel, moved in zip(_PANELS, (False, True), strict=True):
            rows.append([panel, *(_best(report, budget, moved) for budget in budgets)])
        parts.append("\n".join(markdown_table(rows)))
        losses = list(not_ahead(report, budgets))
        lines = (f"- {short(name)} at {budget}: {value.signed()}" for name, budget, value in losses)
        counted = f"{len(losses)} of {len(rivals(report)) * len(budgets)}"
        parts.append("\n".join([f"Not ahead outside the interval, {counted} cases:", "", *lines]))
    return "\n\n".join(parts)


def names_of(report: EvaluationReport) -> list[str]:
    """The settings with a budget, without it."""
    split = (name.partition(":") for name in report.results if ":" in name)
    return list(dict.fromkeys(name + "".join(rest.partition("+")[1:]) for name, _, rest in split))


def rivals(report: EvaluationReport) -> list[str]:
    """The methods that `balanced` is compared with: all but its earlier form."""
    return [name for name in names_of(report) if not name.startswith(BALANCED)]


def not_ahead(report: EvaluationReport, budgets: Sequence[int]) -> Iterator[tuple[str, int, Interval]]:
    """Methods and budgets where `balanced` has no more right answers, or the interval of its lead includes 0.

    Yields:
        The method, the number of tokens, and `balanced` minus the method.
    """
    for budget in budgets:
        for name in rivals(report):
            difference = report.difference(at_budget(BALANCED, budget), at_budget(name, budget))
            if difference.low <= 0:
                yield name, budget, difference


def plot_front(report: EvaluationReport, budgets: Sequence[int], title: str = "") -> Figure:
    """Accuracy over the number of tokens with 95 % intervals, a panel for each form of the methods.

    Args:
        report: The report of first words or of whole answers.
        budgets: The numbers of tokens.
        title: Title of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = Figure(figsize=(9.5, 5.2), dpi=80, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    off = report.accuracy(report.reference)
    methods = list(dict.fromkeys(name.partition("+")[0] for name in rivals(report)))
    for axis, panel, moved in zip(axes, _PANELS, (False, True), strict=True):
        axis.axhspan(off.low, off.high, color="0.88", linewidth=0)
        axis.axhline(off.value, color="0.4", linestyle="--", linewidth=1, label="uncompressed")
        names = [name for name in rivals(report) if ("+" in name) is moved]
        names.sort(key=lambda name: -sum(report.accuracy(at_budget(name, budget)).value for budget in budgets))
        _line_of(axis, report, BALANCED, budgets, color="black", linestyle="-", linewidth=2.2)
        for name in names:
            number = methods.index(name.partition("+")[0])
            color, dash = _COLORS[number % len(_COLORS)], _DASHES[number // len(_COLORS) % len(_DASHES)]
            _line_of(axis, report, name, budgets, color=color, linestyle=dash, linewidth=1.1)
        axis.set_xscale("log")
        axis.set_xticks(list(budgets), list(map(str, budgets)), fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.set_title(panel, fontsize=9)
        axis.legend(fontsize=7, ncols=2, loc="lower right", framealpha=0.8)
    figure.supxlabel("visual tokens that the language model reads", fontsize=10)
    axes[0].set_ylabel("accuracy, mean over the kinds of question", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def _line_of(axis: Axes, report: EvaluationReport, name: str, budgets: Sequence[int], **style: object) -> None:
    cells = [report.accuracy(at_budget(name, budget)) for budget in budgets]
    axis.plot(budgets, [cell.value for cell in cells], label=short(name).partition(",")[0], **style)  # type: ignore[arg-type]
    low, high = [cell.low for cell in cells], [cell.high for cell in cells]
    axis.fill_between(budgets, low, high, color=style["color"], alpha=0.12, linewidth=0)


def short(name: str) -> str:
    """A setting's name in a table: fields that the experiment adds are said in words."""
    head, _, fields = name.partition("+")
    words = ["value path"] * ("text_relevance=value" in fields) + ["original positions"] * ("position_ids" in fields)
    return ", ".join([head, *words])


def _line(report: EvaluationReport, name: str) -> str:
    return f"{name} {report.accuracy(name)} at {report.results[name].tokens.mean():.1f} tokens"


def _best(report: EvaluationReport, budget: int, moved: bool) -> str:
    names = [name for name in rivals(report) if ("+" in name) is moved]
    best = max(names, key=lambda name: report.accuracy(at_budget(name, budget)).value)
    difference = report.difference(at_budget(BALANCED, budget), at_budget(best, budget))
    return f"{best.partition('+')[0]} {difference.signed()}"


__all__ = ["BALANCED", "names_of", "not_ahead", "plot_front", "rivals", "short", "tables"]
