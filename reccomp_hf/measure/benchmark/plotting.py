"""Plots of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .contenders import ORACLE, OURS, STOCK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {STOCK: "0.55", OURS: "C0", ORACLE: "C2"}


def plot_comparison(name: str, facts: Mapping[str, Any]) -> Figure:
    """Prefill and decoding time of the three contenders, a panel per batch size, with quartiles.

    Raises:
        ImportError: matplotlib is missing.
    """
    sizes = list(dict.fromkeys(row["batch_size"] for row in facts["rows"]))
    figure = new_figure(3.8 * len(sizes) + 1, 6.4)
    axes = figure.subplots(2, len(sizes), squeeze=False)
    for column, size in enumerate(sizes):
        rows = [row for row in facts["rows"] if row["batch_size"] == size]
        for line, measure in enumerate(("prefill", "decode")):
            axis = axes[line][column]
            _bars(axis, rows, measure)
            axis.set_title(f"batch {size}" if line == 0 else "", fontsize=10)
            if column == 0:
                axis.set_ylabel("prefill, ms" if measure == "prefill" else "decoding a token, ms")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(name, fontsize=11)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """A matplotlib figure of that size in inches, without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _bars(axis: Axes, rows: Sequence[Mapping[str, Any]], measure: str) -> None:
    """A group of bars per budget."""
    for number, role in enumerate(_COLORS):
        ran = [(place, row["contenders"][role]) for place, row in enumerate(rows) if row["contenders"][role]]
        spreads = [facts["seconds"][measure] for _, facts in ran]
        axis.bar(
            [place + 0.27 * (number - 1) for place, _ in ran],
            [1e3 * spread["median"] for spread in spreads],
            0.25,
            yerr=quartile_errors(spreads, 1e3) if spreads else None,
            color=_COLORS[role],
            label=role,
        )
    axis.set_xticks(range(len(rows)), [str(row["budget"]) for row in rows])
    axis.grid(axis="y", alpha=0.3)


def quartile_errors(spreads: Sequence[Mapping[str, Any]], factor: float = 1) -> list[list[float]]:
    """Distances from the median to the quartiles."""
    below = [factor * (spread["median"] - spread["low"]) for spread in spreads]
    return [below, [factor * (spread["high"] - spread["median"]) for spread in spreads]]


__all__ = ["new_figure", "plot_comparison", "quartile_errors"]
