"""A plot of accuracy against tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import ALL, MEAN, EvaluationReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X<>hp"


def plot_accuracy(report: EvaluationReport, title: str = "") -> Figure:
    """Accuracy of every setting against its mean number of visual tokens, with intervals.

    Settings that differ only in their budget form one line. The first panel shows the mean over the kinds of
    question, the others one kind each.

    Args:
        report: The result of `evaluate`.
        title: Title of the figure.

    Returns:
        A matplotlib figure; `figure.savefig("name.png")` writes it. pyplot is not used.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    kinds = report.kind_names
    columns = [ALL] if len(kinds) == 1 else [MEAN, *kinds]
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(4.1 * across, 3.3 * down + 0.8), dpi=110, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    families: dict[str, list[str]] = {}
    for name in report.results:
        if name != report.reference:
            families.setdefault(_family(name), []).append(name)
    for axis, kind in zip(axes, columns, strict=False):
        off = report.accuracy(report.reference, kind)
        axis.axhspan(off.low, off.high, color="0.88", linewidth=0)
        axis.axhline(off.value, color="0.4", linestyle="--", linewidth=1, label="uncompressed")
        for number, (family, names) in enumerate(families.items()):
            points = sorted((float(report.results[name].tokens.mean()), report.accuracy(name, kind)) for name in names)
            tokens, values = [point[0] for point in points], [point[1].value for point in points]
            errors = [[one.value - one.low for _, one in points], [one.high - one.value for _, one in points]]
            axis.errorbar(
                tokens,
                values,
                yerr=errors,
                label=family,
                marker=_MARKERS[number % len(_MARKERS)],
                color=f"C{number % 10}",
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
            )
        axis.set_title("mean over the kinds of question" if kind == MEAN else kind, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlim(left=0)
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    if len(axes) > len(columns):
        axes[len(columns)].legend(handles, labels, loc="center left", fontsize=9, frameon=False)
    else:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel("visual tokens that the language model reads (mean)", fontsize=10)
    figure.supylabel("accuracy, with 95 % intervals", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _family(name: str) -> str:
    """A setting's name without its budget."""
    head, plus, rest = name.partition("+")
    return head.partition(":")[0] + plus + rest


__all__ = ["plot_accuracy"]
