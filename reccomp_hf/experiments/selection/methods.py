"""Times every method's choice of tokens for one fixed budget on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.choosing import assemble_tokens, select_tokens
from ...core.configuration import TokenRecoveryConfig
from ...core.features import VisualFeatures
from ...core.methods.registry import get_method, method_names
from ...measure.benchmark.timing import Measures, Stopwatch, interleave
from .features import Features

BUDGET = 64
PRESET = "balanced"
"""Timed along with the methods: `recoverable` with the recommended settings."""
WIDER, HEAD = 4, 64
"""Ratio of the widths of LLaVA-1.5-7B's language model and CLIP's ViT-L, and the width of a head of the latter."""


@torch.no_grad()
def time_methods(
    features: Features, rounds: int, stopwatch: Stopwatch, update: Callable[[], object], seed: int = 0
) -> list[dict[str, Any]]:
    """Time the registered methods that take a budget, and one preset, one image at a time and in turns.

    Args:
        features: Features of images, of which a round takes the next one. Projected features are drawn at random.
        rounds: Turns of each method.
        stopwatch: The clock.
        update: Called after every turn.
        seed: Seed of the projected features.

    Returns:
        A row for each method: `"method"`, `"budget"`, mean `"tokens"`, and the seconds per image of `"choosing"` (the
        method's `select`) and of `"all"` (with gathering and merging).
    """
    images, patches, width = features.hidden_states.shape
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(min(images, rounds), patches, WIDER * width, generator=generator)
    budget = min(BUDGET, patches)
    configs = {name: TokenRecoveryConfig(method=name, budget=budget) for name in _names()}
    configs[PRESET] = TokenRecoveryConfig.from_preset(PRESET, budget=budget)
    turns = {name: _Turn(config, features, projected, stopwatch) for name, config in configs.items()}
    for turn in turns.values():  # warm up
        turn()
    taken = interleave(turns, rounds, update)
    return [
        {
            "method": name,
            "budget": budget,
            "tokens": turn.tokens / turn.images,
            **{measure: taken[name][measure].to_dict() for measure in ("choosing", "all")},
        }
        for name, turn in turns.items()
    ]


def count_methods() -> int:
    """Number of rows that `time_methods` returns."""
    return len(_names()) + 1


def _names() -> list[str]:
    return [name for name in method_names() if get_method(name).budget != "none"]


class _Turn:
    """One turn: a method on the next image."""

    def __init__(
        self, config: TokenRecoveryConfig, features: Features, projected: Tensor, stopwatch: Stopwatch
    ) -> None:
        self.config, self.features, self.projected, self.stopwatch = config, features, projected, stopwatch
        self.tokens = self.images = 0

    def __call__(self) -> Measures:
        image = self.images % len(self.projected)
        found, config = self._image(slice(image, image + 1)), self.config
        choosing, selection = self.stopwatch.time(lambda: select_tokens(found, config))
        sizes = selection.read_sizes()
        merging, record = self.stopwatch.time(lambda: assemble_tokens(found, selection, config, sizes))
        self.tokens, self.images = self.tokens + int(record.counts.sum()), self.images + 1
        return {"choosing": choosing, "all": choosing + merging}

    def _image(self, rows: slice) -> VisualFeatures:
        arguments = self.features[rows].arguments()
        width = arguments[0].shape[-1]
        heads = width // HEAD if width % HEAD == 0 else 1
        found = VisualFeatures(*arguments, num_heads=heads, projected=self.projected[rows])
        found.received = found.saliency("mean").unsqueeze(1).expand(-1, 2, -1)  # made by the tower, not timed here
        return found


__all__ = ["BUDGET", "count_methods", "time_methods"]
