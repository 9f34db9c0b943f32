"""How the cost of `recover_tokens` grows with the batch, with tiles and with patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...core.choosing import assemble_tokens, select_tokens
from ...core.configuration import TokenRecoveryConfig
from ...core.features import VisualFeatures
from ...core.outliers import upper_outliers
from ...data.progress import progress_bar
from ...measure.benchmark.comparing import check_counts
from ...measure.benchmark.environment import environment
from ...measure.benchmark.timing import Measures, Spread, Stopwatch, interleave
from .features import PATCHES, WIDTH, make_features, one_thread

AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "tiles": (1, 2, 3, 4, 5),
    "patches": (144, 324, 576, 1296, 2304, 4096),
}
"""What grows -> its sizes. Images of a batch have 576 patches, as a tile has; patches grow at batch 1."""
SCALED: dict[str, TokenRecoveryConfig] = {
    "dynamic": TokenRecoveryConfig(),
    "budget 64": TokenRecoveryConfig(budget=64),
    "balanced": TokenRecoveryConfig.from_preset("balanced"),
}
ROUNDS = 9
STEPS = {
    "all": "recover_tokens",
    "choosing": "scores, outliers, and which patches are kept",
    "outliers": "one local outlier factor, timed apart; the dynamic mode's choosing holds three",
    "merging": "clustering the rest around the centres, and gathering the tokens",
}
"""Name of a step -> what it is."""


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of the straight line of least squares through the logarithms: seconds grow like size ** slope.

    Raises:
        ValueError: Fewer than two sizes, or values that have no logarithm.
    """
    if len(sizes) < 2 or min(*sizes, *seconds) <= 0:
        raise ValueError(f"An exponent needs two sizes or more and positive times, got {sizes} and {seconds}.")
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def n_log_n(sizes: Sequence[float]) -> float:
    """The exponent that a cost of N log N shows over these sizes."""
    return exponent(sizes, [size * math.log(size) for size in sizes])


@torch.no_grad()
def measure_scaling(
    *,
    axes: Mapping[str, Sequence[int]] = AXES,
    rounds: int = ROUNDS,
    width: int = WIDTH,
    patches: int = PATCHES,
    seed: int = 0,
    cpu_time: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Time `recover_tokens` over growing inputs on one CPU thread in float32, all sizes and settings in turns.

    Args:
        axes: What grows -> its sizes; keys of `AXES`.
        rounds: Turns of each size.
        width: Of a patch.
        patches: Per tile where they do not grow themselves.
        seed: Of the features.
        cpu_time: Count CPU seconds of this process, see [`Stopwatch`].
        progress: Show a progress bar; `None` where stderr is a terminal.

    Returns:
        JSON values: `"axes"`, by axis and setting the seconds at every size and the exponents fitted to the medians:
        over all sizes, and over the upper half of them, where what every call costs no longer hides the growth; of
        each of the `STEPS`.
    """
    check_counts(rounds=rounds, patches=patches, width=width)
    total = sum(len(sizes) for sizes in axes.values()) * len(SCALED) * rounds
    bar = progress_bar(total, "turns", progress)
    stopwatch, found = Stopwatch(torch.device("cpu"), cpu_time), {}
    with one_thread(), bar:
        for axis, sizes in axes.items():
            turns = {
                (name, size): _turn(axis, size, config, patches, width, seed, stopwatch)
                for name, config in SCALED.items()
                for size in sizes
            }
            found[axis] = _measure(turns, list(sizes), rounds, bar.update)
        facts = environment(torch.device("cpu"), torch.float32)
    settings = {"width": width, "patches": patches, "rounds": rounds, "seed": seed, "clock": stopwatch.clock}
    return {"environment": facts, "settings": settings, "steps": STEPS, "axes": found}


def _turn(
    axis: str, size: int, config: TokenRecoveryConfig, patches: int, width: int, seed: int, stopwatch: Stopwatch
) -> Callable[[], Measures]:
    """`recover_tokens` step by step on an input of that size."""
    rows = size if axis in ("batch", "tiles") else 1
    arguments = make_features(rows, size if axis == "patches" else patches, width, seed).arguments()
    tiles = [size] if axis == "tiles" else [1] * rows

    def turn() -> Measures:
        features = VisualFeatures(*arguments, tiles=tiles)
        choosing, selection = stopwatch.time(lambda: select_tokens(features, config))
        sizes = selection.read_sizes()
        merging, _ = stopwatch.time(lambda: assemble_tokens(features, selection, config, sizes))
        outliers, _ = stopwatch.time(
            lambda: upper_outliers(
                selection.saliency, config.outlier_neighbors, config.outlier_threshold, features.valid
            )
        )
        return {"all": choosing + merging, "choosing": choosing, "outliers": outliers, "merging": merging}

    return turn


def _measure(
    turns: Mapping[tuple[str, int], Callable[[], Measures]], sizes: list[int], rounds: int, step: Callable[[], Any]
) -> dict[str, Any]:
    for turn in turns.values():  # warm up
        turn()
    taken = interleave({f"{name} {size}": turn for (name, size), turn in turns.items()}, rounds, step)
    found = {
        setting: {part: _growth(sizes, [taken[f"{setting} {size}"][part] for size in sizes]) for part in STEPS}
        for setting in dict.fromkeys(name for name, _ in turns)
    }
    return {"sizes": sizes, "n_log_n": n_log_n(sizes) if min(sizes) > 1 else None, "settings": found}


def _growth(sizes: Sequence[int], times: Sequence[Spread]) -> dict[str, Any]:
    """Seconds at every size, and the exponents of their medians."""
    medians, upper = [spread.median for spread in times], len(sizes) // 2
    few = len(sizes) - upper < 2
    return {
        "seconds": [spread.to_dict() for spread in times],
        "exponent": exponent(sizes, medians),
        "upper_exponent": None if few else exponent(sizes[upper:], medians[upper:]),
    }


__all__ = ["AXES", "ROUNDS", "SCALED", "STEPS", "exponent", "measure_scaling", "n_log_n"]
