"""Plots of the selection experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...measure.benchmark.plotting import new_figure, quartile_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}


def plot_choosing(facts: Mapping[str, Any]) -> Figure:
    """How many times as long the loops take as `recover_tokens`, with quartiles.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(7.5, 4)
    axis = figure.subplots()
    labels = [f"{row['setting']}\nbatch {row['batch_size']}" for row in facts["rows"]]
    for number, loop in enumerate(facts["loops"]):
        ratios = [row["ratios"][loop] for row in facts["rows"]]
        places = [place + 0.4 * (number - 0.5) for place in range(len(labels))]
        axis.bar(
            places, [ratio["median"] for ratio in ratios], 0.38, yerr=quartile_errors(ratios), label=f"{loop} / ours"
        )
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
    figure = new_figure(4.2 * len(axes_of), 5)
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


__all__ = ["plot_choosing", "plot_scaling"]
