"""The choice of tokens alone: by Triton kernels, by the loops they stand for, and as a part of a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.configuration import TokenRecoveryConfig
from ...core.features import VisualFeatures
from ...core.graphs import CudaRecorder, Recorder
from ...core.kernels import loops_only
from ...core.methods.registry import get_method
from ...core.tensors import used_constants
from .counting import launches
from .reporting import format_milliseconds
from .speed import GRAPHED, ROUNDS, Build, Part, summary
from .timing import Measures, Stopwatch, interleave

KERNELS, LOOPS = "kernels", "loops"
WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    KERNELS: contextlib.nullcontext,
    LOOPS: loops_only,
}
"""Ways to run greedy loops -> a context for each; without a GPU both are the loops."""
PRESETS = ("paper", "balanced")
METHODS = ("divprune", "cdpruner", "scope", "vispruner")
PATCHES, WIDTH, PROJECTED, HEADS = 576, 1024, 4096, 16


def choices(build: Build, batch_size: int, budget: int, rounds: int = ROUNDS) -> Part:
    """The part that times the choice of `budget` tokens by presets and by every greedy method.

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
    names = ("hidden_states", "class_query", "keys", "text_similarity", "projected")
    inputs = {
        name: torch.randn(shape, generator=generator).to(device) for name, shape in zip(names, shapes, strict=True)
    }
    features, rows, recorder = _features(inputs), [], new_recorder(device)
    settings = {preset: TokenRecoveryConfig.from_preset(preset, budget=budget) for preset in PRESETS}
    settings |= {method: TokenRecoveryConfig(method=method, budget=budget) for method in METHODS}
    for name, config in settings.items():
        work = functools.partial(get_method(config.method).select, features, config)
        turns = {way: functools.partial(_turn, work, context, stopwatch) for way, context in WAYS.items()}
        interleave(turns, 1)  # compiles
        failed: dict[str, str] = {}
        with used_constants():  # a graph reads them where they are
            if recorder is not None:
                try:
                    replay, _ = recorder(functools.partial(_kept, config), inputs)
                except RuntimeError as error:
                    failed[GRAPHED] = summary(error)
                else:
                    turns[GRAPHED] = functools.partial(_turn, replay, contextlib.nullcontext, stopwatch)
            times = interleave(turns, rounds)
        counts = {}
        for way, context in WAYS.items():
            with context():
                counts[way] = launches(work, device)
        row = {"method": name, "case": f"the choice by {name}", "budget": budget, "batch_size": size}
        seconds = {way: spreads["choice"].to_dict() for way, spreads in times.items()}
        rows.append({**row, "choice": seconds, "launches": counts, "failed": failed})
    return rows


def new_recorder(device: torch.device) -> Recorder | None:
    """A recorder of CUDA graphs; `None` without a GPU."""
    return CudaRecorder() if device.type == "cuda" else None


def _kept(config: TokenRecoveryConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The patches that a choice keeps, as a recorder wants its computation."""
    return {"kept": get_method(config.method).select(_features(inputs), config).kept_mask}


def _features(inputs: Mapping[str, Any]) -> VisualFeatures:
    return VisualFeatures(**inputs, num_heads=HEADS)


def _turn(
    work: Callable[[], Any], context: Callable[[], contextlib.AbstractContextManager[None]], stopwatch: Stopwatch
) -> Measures:
    with context():
        return {"choice": stopwatch.time(work)[0]}


def choices_table(rows: list[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the part as cells: milliseconds and launches by way, and milliseconds as a CUDA graph."""
    columns = [f"{way}, {what}" for way in WAYS for what in ("ms", "launches")]
    table = [["method", "tokens", "batch", *columns, f"{GRAPHED}, ms"]]
    for row in rows:
        cells = [row["method"], str(row["budget"]), str(row["batch_size"])]
        for way in WAYS:
            cells += [format_milliseconds(row["choice"][way]), str(row["launches"][way])]
        table.append([*cells, format_milliseconds(row["choice"].get(GRAPHED))])
    return table


__all__ = ["choices", "choices_table"]
