"""A plot of divergence against visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .goal import COMMON, RULES
from .result import Tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "sD^vP*X<>hp"


def plot_tuning(tuning: Tuning, title: str = "") -> Figure:
    """Divergence from the uncompressed model against the mean number of visual tokens.

    Every candidate is a thin line over its budgets, on the questions on which settings were chosen; the contenders
    are thick, with intervals, on the other questions.

    Args:
        tuning: The result of [`tune`].
        title: Title of the figure.

    Returns:
        A matplotlib figure; `figure.savefig("name.png")` writes it. pyplot is not used.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axis = figure.subplots()
    if tuning.scores is not None:
        tokens, divergence = tuning.scores.tokens.mean(1), tuning.scores.divergence.mean(1)
        lines: dict[str, list[tuple[float, float]]] = {}
        for name, *point in zip(tuning.scores.names, tokens, divergence, strict=True):
            lines.setdefault(name.replace(f":{tuning.budgets[name]}", "", 1), []).append((point[0], point[1]))
        for number, (name, points) in enumerate(lines.items()):
            marker = _MARKERS[number % len(_MARKERS)]
            across, up = zip(*sorted(points), strict=True)
            axis.plot(across, up, marker=marker, linewidth=0.8, markersize=4, alpha=0.7, label=name)
    families: dict[str, list[str]] = {}
    for name in tuning.contenders:
        families.setdefault(name.partition(",")[0], []).append(name)
    for family, names in families.items():
        found = sorted((tuning.contenders[name] for name in names), key=lambda contender: contender.tokens)
        values = [contender.divergence.value for contender in found]
        errors = [
            [contender.divergence.value - contender.divergence.low for contender in found],
            [contender.divergence.high - contender.divergence.value for contender in found],
        ]
        style = {COMMON: "-", RULES: "--"}.get(family, ":")
        axis.errorbar(
            [contender.tokens for contender in found],
            values,
            yerr=errors,
            label=f"{family} (other questions)",
            color="black",
            linestyle=style,
            marker="o",
            linewidth=2,
            capsize=3,
        )
    budgets = sorted({round(contender.tokens) for contender in tuning.contenders.values()})
    axis.set_xscale("log")
    axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("visual tokens that the language model reads (mean)")
    axis.set_ylabel("divergence from the uncompressed model, bits")
    axis.set_title(title, fontsize=11)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


__all__ = ["plot_tuning"]
