"""The choice of tokens alone: its time and its launches, by Triton kernels and by the loops they stand for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...core.configuration import TokenRecoveryConfig
from ...core.features import VisualFeatures
from ...core.kernels import loops_only
from ...core.methods.registry import get_method
from .counting import launches
from .speed import ROUNDS, Build, Part
from .timing import Measures, Stopwatch, interleave

KERNELS, LOOPS = "kernels", "loops"
WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    KERNELS: contextlib.nullcontext,
    LOOPS: loops_only,
}
"""Ways to run greedy loops -> a context for each; without a GPU both are the loops."""
METHODS = ("divprune", "cdpruner", "scope", "vispruner")
PATCHES, WIDTH, PROJECTED = 576, 1024, 4096


def choices(build: Build, batch_size: int, budget: int, rounds: int = ROUNDS) -> Part:
    """The part that times the choice of `budget` tokens by the preset `balanced` and by every greedy method.

    Features are random, of LLaVA-1.5-7B's size, in float32, on the device of the model that `build` makes.
    """
    title = f"choices of {budget} tokens, batch {batch_size}"
    return Part("choices", title, build, lambda model, _: _choices(model.device, batch_size, budget, rounds))


@torch.no_grad()
def _choices(device: torch.device, size: int, budget: int, rounds: int) -> list[dict[str, Any]]:
    generator, stopwatch = torch.Generator().manual_seed(0), Stopwatch(device)
    shapes = (
        (size, PATCHES, WIDTH),
        (size, WIDTH),
        (size, PATCHES + 1, WIDTH),
        (size, PATCHES),
        (size, PATCHES, PROJECTED),
    )
    states, query, keys, similarity, projected = (
        torch.randn(shape, generator=generator).to(device) for shape in shapes
    )
    features, rows = VisualFeatures(states, query, keys, similarity, num_heads=16, projected=projected), []
    settings = {"balanced": TokenRecoveryConfig.from_preset("balanced", budget=budget)}
    settings |= {method: TokenRecoveryConfig(method=method, budget=budget) for method in METHODS}
    for name, config in settings.items():
        work = functools.partial(get_method(config.method).select, features, config)
        turns = {way: functools.partial(_turn, work, context, stopwatch) for way, context in WAYS.items()}
        interleave(turns, 1)  # compiles
        times = interleave(turns, rounds)
        counts = {}
        for way, context in WAYS.items():
            with context():
                counts[way] = launches(work, device)
        seconds = {way: spreads["choice"].to_dict() for way, spreads in times.items()}
        rows.append({"method": name, "budget": budget, "batch_size": size, "choice": seconds, "launches": counts})
    return rows


def _turn(
    work: Callable[[], Any], context: Callable[[], contextlib.AbstractContextManager[None]], stopwatch: Stopwatch
) -> Measures:
    with context():
        return {"choice": stopwatch.time(work)[0]}


def choices_table(rows: list[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the part as cells: milliseconds and launches by way."""
    table = [["method", "tokens", "batch", *(f"{way}, {what}" for way in WAYS for what in ("ms", "launches"))]]
    for row in rows:
        cells = [row["method"], str(row["budget"]), str(row["batch_size"])]
        for way in WAYS:
            cells += [f"{row['choice'][way]['median'] * 1e3:.2f}", str(row["launches"][way])]
        table.append(cells)
    return table


__all__ = ["choices", "choices_table"]
