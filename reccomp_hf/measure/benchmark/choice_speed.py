"""The time that every method takes to choose the tokens of images, without the model around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.choosing import recover_tokens
from ...core.configuration import TokenRecoveryConfig
from ...core.graphs import GraphCache
from ...core.methods.registry import get_method, method_names
from .timing import Spread, Stopwatch

PATCHES, WIDTH, HEADS, PROJECTED = 576, 1024, 16, 4096
"""Sizes of LLaVA-1.5-7B."""
BUDGET, ROUNDS = 64, 5


def choice_settings(budget: int = BUDGET) -> dict[str, TokenRecoveryConfig]:
    """The presets, and every other method with its defaults, each with the budget if it may have one."""
    presets = {name: TokenRecoveryConfig.from_preset(name, budget=budget) for name in ("paper", "balanced")}
    named: dict[str, TokenRecoveryConfig] = {"paper, dynamic": TokenRecoveryConfig.from_preset("paper"), **presets}
    for name in method_names():
        if name != "recoverable":
            own_budget = None if get_method(name).budget == "none" else budget
            named[name] = TokenRecoveryConfig(method=name, budget=own_budget)
    return named


def choice_rows(
    settings: Mapping[str, TokenRecoveryConfig],
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    graphs: GraphCache | None,
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Seconds of every choice, eager and by CUDA graphs, on random features of LLaVA-1.5-7B's sizes.

    Args:
        settings: Settings by name.
        batch_sizes: Numbers of images.
        device: The device of the features.
        dtype: Dtype of the features that the model gives in its own.
        graphs: A place for CUDA graphs; `None` leaves them out.
        rounds: Timed runs, after two others.

    Returns:
        Rows with `"settings"`, `"batch_size"`, and `"eager"` and `"graph"`: medians, `None` where it did not run.
    """
    rows, stopwatch = [], Stopwatch(device)
    for size in batch_sizes:
        features = _features(size, device, dtype)
        for name, config in settings.items():
            eager = functools.partial(_choose, config, features)
            replay = functools.partial(_replay, graphs, (name, size), functools.partial(_choose, config), features)
            with torch.no_grad():
                seconds = {"eager": _median(stopwatch, rounds, eager), "graph": _median(stopwatch, rounds, replay)}
            rows.append({"settings": name, "batch_size": size, **seconds})
    return rows


def _replay(graphs: GraphCache | None, key: tuple[str, int], choose: Any, features: dict[str, Tensor]) -> Any:
    return None if graphs is None else graphs.run("choice", [], key, choose, features)


def _choose(config: TokenRecoveryConfig, features: dict[str, Tensor]) -> dict[str, Tensor]:
    others: dict[str, Any] = {name: features[name] for name in ("projected", "received", "class_state")}
    similarity = features["text_similarity"]
    arguments = (features["hidden_states"], features["class_query"], features["keys"], similarity)
    record = recover_tokens(*arguments, config, num_heads=HEADS, **others)
    return {"tokens": record.tokens, "counts": record.counts}


def _features(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": made(batch, PATCHES, WIDTH),
        "class_query": made(batch, WIDTH),
        "keys": made(batch, PATCHES + 1, WIDTH),
        "text_similarity": made(batch, PATCHES, dtype=torch.float32),
        "projected": made(batch, PATCHES, PROJECTED),
        "received": made(batch, 2, PATCHES, dtype=torch.float32).softmax(-1),
        "class_state": made(batch, WIDTH),
    }


def _median(stopwatch: Stopwatch, rounds: int, work: Callable[[], Any]) -> float | None:
    """Median of the seconds; `None` if the work returns nothing."""
    if [work(), work()][-1] is None:
        return None
    return Spread(tuple(stopwatch.time(work)[0] for _ in range(rounds))).median


__all__ = ["BUDGET", "choice_rows", "choice_settings"]
