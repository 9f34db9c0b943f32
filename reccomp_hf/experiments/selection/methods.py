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
from .published import PUBLISHED_LOOPS, PublishedLoop

BUDGET = 64
PRESET = "balanced"
"""Timed along with the methods: `recoverable` with the recommended settings."""
WIDER, HEAD = 4, 64
"""Ratio of the widths of LLaVA-1.5-7B's language model and CLIP's ViT-L, and the width of a head of the latter."""

_BATCH, _CHECKED, _WORDS = 8, 5, 16


@torch.no_grad()
def time_methods(
    features: Features, rounds: int, stopwatch: Stopwatch, update: Callable[[], object], seed: int = 0
) -> list[dict[str, Any]]:
    """Time the registered methods that take a budget, and one preset, one image at a time, in batches and in turns.

    The loops of published.py are timed along with them.

    Args:
        features: Features of images, of which a round takes the next one. Projected features are drawn at random.
        rounds: Turns of each method.
        stopwatch: The clock.
        update: Called after every turn.
        seed: Seed of the projected features.

    Returns:
        A row for each method: `"method"`, `"budget"`, mean `"tokens"`, and the seconds per image of `"choosing"` (the
        method's `select`) and of `"all"` (with gathering and merging), of `"batch"`, as `"choosing"` for
        `"batch_size"` images at once, and of the `"loop"` of a method that has a published one.

    Raises:
        RuntimeError: A published loop chooses other patches.
    """
    images, patches, width = features.hidden_states.shape
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(min(images, rounds), patches, WIDER * width, generator=generator)
    budget = min(BUDGET, patches)
    configs = {name: TokenRecoveryConfig(method=name, budget=budget) for name in _names()}
    configs[PRESET] = TokenRecoveryConfig.from_preset(PRESET, budget=budget)
    turns = {name: _Turn(config, features, projected, stopwatch) for name, config in configs.items()}
    batches = {name: _Turn(config, features, projected, stopwatch, _BATCH) for name, config in configs.items()}
    loops = {name: _LoopTurn(loop, turns[name], budget) for name, loop in PUBLISHED_LOOPS.items()}
    every: dict[str, Callable[[], Measures]] = dict(turns)
    every |= {f"{name} batch": turn for name, turn in batches.items()}
    every |= {f"{name} loop": turn for name, turn in loops.items()}
    for loop in loops.values():
        loop.check()
    for turn in every.values():  # warm up
        turn()
    taken = interleave(every, rounds, update)

    return [
        {
            "method": name,
            "budget": budget,
            "tokens": turn.tokens / turn.images,
            **{measure: taken[name][measure].to_dict() for measure in ("choosing", "all")},
            "batch_size": batches[name].size,
            "batch": taken[f"{name} batch"]["choosing"].to_dict(),
            **({"loop": taken[f"{name} loop"]["seconds"].to_dict()} if name in loops else {}),
        }
        for name, turn in turns.items()
    ]


def count_methods() -> int:
    """Number of turns of a round of `time_methods`."""
    return 2 * (len(_names()) + 1) + len(PUBLISHED_LOOPS)


def _names() -> list[str]:
    return [name for name in method_names() if get_method(name).budget != "none"]


class _Turn:
    """One turn: a method on the next images."""

    def __init__(
        self, config: TokenRecoveryConfig, features: Features, projected: Tensor, stopwatch: Stopwatch, size: int = 1
    ) -> None:
        self.config, self.features, self.projected, self.stopwatch = config, features, projected, stopwatch
        self.size = min(size, len(projected))
        self.tokens = self.images = 0

    def __call__(self) -> Measures:
        first = self.images % (len(self.projected) - self.size + 1)
        found, config = self.rows(slice(first, first + self.size)), self.config
        choosing, selection = self.stopwatch.time(lambda: select_tokens(found, config))
        sizes = selection.read_sizes()
        merging, record = self.stopwatch.time(lambda: assemble_tokens(found, selection, config, sizes))
        self.tokens, self.images = self.tokens + int(record.counts[0]), self.images + 1
        return {"choosing": choosing / self.size, "all": (choosing + merging) / self.size}

    def rows(self, rows: slice) -> VisualFeatures:
        """The features of some images."""
        arguments = self.features[rows].arguments()
        width = arguments[0].shape[-1]
        heads = width // HEAD if width % HEAD == 0 else 1
        projected = self.projected[rows]
        found = VisualFeatures(*arguments, num_heads=heads, projected=projected, class_state=arguments[1])
        # Made by the modules of a model, not timed here.
        found.received = found.saliency("mean").unsqueeze(1).expand(-1, 2, -1)
        found.word_similarity = projected[..., :_WORDS].transpose(1, 2).tanh() / 4
        return found


class _LoopTurn:
    """One turn: a published loop on the next image of a method's turns."""

    def __init__(self, loop: PublishedLoop, turn: _Turn, budget: int) -> None:
        self.loop, self.turn, self.budget, self.images = loop, turn, budget, 0

    def __call__(self) -> Measures:
        image = self.images % len(self.turn.projected)
        seconds, _ = self.turn.stopwatch.time(lambda: self.choose(image))
        self.images += 1
        return {"seconds": seconds}

    def choose(self, image: int) -> Tensor:
        """The loop's patches of an image."""
        return self.loop(self.turn.rows(slice(image, image + 1)), self.budget)

    def check(self) -> None:
        """Refuse a loop that chooses other patches in most images: in a few, rounding may decide a near tie."""
        images = min(_CHECKED, len(self.turn.projected))
        kept = select_tokens(self.turn.rows(slice(0, images)), self.turn.config).kept_mask
        same = [row.nonzero().flatten().equal(self.choose(image)) for image, row in enumerate(kept)]
        if 2 * sum(same) <= len(same):
            raise RuntimeError(f"The published loop of {self.turn.config.method!r} chooses other patches.")


__all__ = ["BUDGET", "count_methods", "time_methods"]
