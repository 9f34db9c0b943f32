"""The benchmarks' findings, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .contenders import ORACLE, OURS, STOCK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
_COLORS = {STOCK: "0.55", OURS: "C0", ORACLE: "C2"}


def plot_comparison(name: str, facts: Mapping[str, Any]) -> Figure:
    """Prefill and decoding time of the three contenders, a panel per batch size, with quartiles.

    Raises:
        ImportError: matplotlib is missing.
    """
    sizes = list(dict.fromkeys(row["batch_size"] for row in facts["rows"]))
    figure = _figure(3.8 * len(sizes) + 1, 6.4)
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


def plot_choosing(facts: Mapping[str, Any]) -> Figure:
    """How many times as long the loops take as `recover_tokens`, with quartiles.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(7.5, 4)
    axis = figure.subplots()
    labels = [f"{row['setting']}\nbatch {row['batch_size']}" for row in facts["rows"]]
    for number, loop in enumerate(facts["loops"]):
        ratios = [row["ratios"][loop] for row in facts["rows"]]
        places = [place + 0.4 * (number - 0.5) for place in range(len(labels))]
        axis.bar(places, [ratio["median"] for ratio in ratios], 0.38, yerr=_errors(ratios), label=f"{loop} / ours")
    axis.axhline(1, color="0.4", linewidth=0.8)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylabel("times as long per image")
    axis.legend(fontsize=8, frameon=False)
    return figure


def plot_scaling(facts: Mapping[str, Any]) -> Figure:
    """Seconds of `recover_tokens` and of its steps against size on logarithmic axes, with the exponents.

    Raises:
        ImportError: matplotlib is missing.
    """
    axes_of = facts["axes"]
    figure = _figure(4.2 * len(axes_of), 5)
    panels = figure.subplots(1, len(axes_of), squeeze=False)[0]
    for axis, (name, entry) in zip(panels, axes_of.items(), strict=True):
        for number, (setting, steps) in enumerate(entry["settings"].items()):
            for step, style in (("all", "-"), ("merging", ":")):
                seconds = [1e3 * spread["median"] for spread in steps[step]["seconds"]]
                label = f"{setting}, {step}: {steps[step]['exponent']:.2f}"
                axis.plot(entry["sizes"], seconds, style, marker="o", markersize=3, color=f"C{number}", label=label)
        axis.set_xscale("log")
        axis.set_xticks(entry["sizes"], [str(size) for size in entry["sizes"]], fontsize=8)
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, title="exponent", title_fontsize=7, ncols=2, **_BELOW)
    return figure


def _figure(width: float, height: float) -> Figure:
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
            yerr=_errors(spreads, 1e3) if spreads else None,
            color=_COLORS[role],
            label=role,
        )
    axis.set_xticks(range(len(rows)), [str(row["budget"]) for row in rows])
    axis.grid(axis="y", alpha=0.3)


def _errors(spreads: Sequence[Mapping[str, Any]], factor: float = 1) -> list[list[float]]:
    """Distances from the median to the quartiles."""
    below = [factor * (spread["median"] - spread["low"]) for spread in spreads]
    return [below, [factor * (spread["high"] - spread["median"]) for spread in spreads]]


__all__ = ["plot_choosing", "plot_comparison", "plot_scaling"]
