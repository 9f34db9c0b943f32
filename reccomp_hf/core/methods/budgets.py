"""Fixed budgets: how tiles share one, how it is split between stages; and other tools of several methods."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..features import Bounds, Sizes, VisualFeatures
from ..settings import Settings
from ..tensors import constant, highest_precision, positions, top_mask

FENCE = 1.5
"""Interquartile ranges above the third quartile beyond which a value stands out (Tukey's box plot)."""


@dataclasses.dataclass
class Spending:
    """A fixed budget as the tiles spend it.

    Args:
        counts: (B,) int64, tokens of each tile; 0 for a tile that keeps all its patches.
        whole: (B, N) bool, the patches of tiles that keep all of them.
        most: No entry of `counts` is larger.
        bounds: Bounds without merged tokens; `None` if every tile has exactly `tokens`.
        tokens: No tile has more tokens, those of tiles that keep all their patches included.
    """

    counts: Tensor
    whole: Tensor
    most: int
    bounds: Bounds | None
    tokens: int

    @property
    def known(self) -> int | None:
        """Tokens of every tile if they are known without reading the device, else `None`."""
        return self.tokens if self.bounds is None else None

    def split(self, part: Callable[[int], int]) -> Tensor:
        """A part of each tile's tokens, given as a function of their number: (B,) int64."""
        return constant(self.counts, tuple, tuple(part(count) for count in range(self.most + 1)))[self.counts]

    def sizes(self, merged: Callable[[int], int] = lambda count: 0) -> Sizes | Bounds:
        """`TokenSelection.known_sizes`, given the number of merged tokens among `count` tokens."""
        if self.bounds is None:
            return Sizes(self.tokens, merged(self.most), self.tokens * len(self.counts))
        return self.bounds._replace(most_merged=max(merged(count) for count in range(self.most + 1)))


def spend(features: VisualFeatures, settings: Settings) -> Spending:
    """The budget of the settings, tile by tile."""
    counts, most = tile_budgets(features, settings)
    whole = features.valid & (counts >= features.valid.sum(-1)).unsqueeze(-1)
    keeps_all = features.uniform and most == features.valid.shape[1]
    counts = counts.masked_fill(whole.any(-1), 0)
    bounds = None if features.uniform else budget_bounds(features, settings.budget)
    return Spending(counts, whole, 0 if keeps_all else most, bounds, most)


def budget_bounds(features: VisualFeatures, budget: float | None, most_merged: int = 0) -> Bounds:
    """Bounds of a choice that gives every image the tokens that a budget allows, `most_merged` of them merged.

    They depend on numbers of tiles and not on sizes of images: tiles count as if all of their patches were valid.
    """
    patches = features.valid.shape[1]
    of_images = [budget_tokens(budget, tiles * patches) for tiles in features.tiles]
    longest = min(max(of_images), patches)
    return Bounds(longest, min(most_merged, longest), sum(of_images), max(of_images))


def tile_budgets(features: VisualFeatures, settings: Settings) -> tuple[Tensor, int]:
    """An image's fixed budget divided among its tiles, in proportion to their valid patches, by largest remainder.

    The published code of most methods gives every tile the same number; this spends nothing on patches that unpadding
    removes, and the sum is exact.

    Returns:
        (B,) int64, with equal remainders in favour of the lower tile; and a number that none of them exceeds.
    """
    patches, tiles = features.valid.shape[1], max(features.tiles)
    most = budget_tokens(settings.budget, patches * tiles)
    if features.uniform:
        return torch.full_like(features.valid[:, 0], most, dtype=torch.long), most
    own = features.per_image(features.valid.sum(-1, keepdim=True), 0)  # (I, S)
    total = own.sum(-1, keepdim=True)
    budget = constant(own, budget_table, settings.budget, patches * tiles)[total]  # (I, 1)
    exact, total = budget * own, total.clamp(min=1)
    seats, remainder = exact // total, exact % total
    seats = seats + top_mask(remainder.float(), budget.squeeze(-1) - seats.sum(-1), own > 0)
    return features.per_tile(seats).squeeze(-1), min(patches, most)


class BudgetSplit(NamedTuple):
    """Tokens of a fixed budget by stage."""

    visual: int
    text: int
    coverage: int
    merged: int


def budget_split(patches: int, budget: float, text_share: float, coverage_share: float, merged: int) -> BudgetSplit:
    """Split a fixed budget between the stages.

    Args:
        patches: Valid patches of the image.
        budget: An int is a number of tokens, a float a share of the patches.
        text_share: Share of the kept tokens, without those for coverage, that the question chooses.
        coverage_share: Share of the kept tokens that cover the image.
        merged: Merged tokens; fewer if the budget is not above them, none if all patches are kept.
    """
    total = budget if isinstance(budget, int) else max(1, math.floor(budget * patches + 0.5))
    merged = 0 if total >= patches else min(merged, total - 1)
    total = min(total, patches)
    coverage = math.floor(coverage_share * (total - merged))
    text = math.floor(text_share * (total - merged - coverage))
    return BudgetSplit(total - merged - coverage - text, text, coverage, merged)


def budget_tokens(budget: float | None, patches: int) -> int:
    """Number of tokens a budget allows for `patches` patches; all of them without a budget."""
    return patches if budget is None else sum(budget_split(patches, budget, 0, 0, 0))


@functools.lru_cache(maxsize=64, typed=True)  # a budget of 1 is one token, one of 1.0 is all of them
def budget_table(budget: float | None, patches: int) -> list[int]:
    """`budget_tokens` for 0 to `patches` patches."""
    return [budget_tokens(budget, count) for count in range(patches + 1)]


def count_above_fence(values: Tensor, valid: Tensor) -> Tensor:
    """Number of valid values of each row above Q3 + 1.5 (Q3 - Q1); quartiles by linear interpolation.

    Args:
        values: (B, N) float.
        valid: (B, N) bool.

    Returns:
        (B,) int64.
    """
    values = highest_precision(values).masked_fill(~valid, torch.inf)
    ordered, last = values.sort(-1).values, (valid.sum(-1, keepdim=True) - 1).clamp(min=0)

    def quartile(number: int) -> Tensor:
        place = number * last
        below, share = place // 4, (place % 4).to(ordered.dtype) / 4
        low, high = ordered.gather(-1, below), ordered.gather(-1, torch.minimum(below + 1, last))
        return low + torch.where(share > 0, share * (high - low), 0)

    first, third = quartile(1), quartile(3)
    return ((values > third + FENCE * (third - first)) & valid).sum(-1)


def at_places(candidates: Tensor, places: Tensor, counts: Tensor) -> Tensor:
    """The candidates of each row at the given places, counted among the candidates in raster order.

    Args:
        candidates: (B, N) bool.
        places: (B, M) int64; those that count are below the row's number of candidates.
        counts: (B,) int64, number of a row's places that count.

    Returns:
        (B, N) bool.
    """
    beyond = candidates.shape[1]
    places = torch.where(positions(places) < counts.unsqueeze(-1), places, beyond)
    wanted = torch.zeros_like(candidates[:, :1]).expand(-1, beyond + 1).scatter(-1, places, True)
    return candidates & wanted.gather(-1, (candidates.cumsum(-1) - 1).clamp(min=0))


def weighted_sums(states: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of patches, in float32 at least: (B, N, C), weights (B, M, N) -> (B, M, C) as `states`."""
    precise = torch.promote_types(states.dtype, torch.float32)
    return (weights.to(precise) @ states.to(precise)).to(states.dtype)


__all__ = [
    "BudgetSplit",
    "Spending",
    "at_places",
    "budget_bounds",
    "budget_split",
    "budget_table",
    "budget_tokens",
    "count_above_fence",
    "spend",
    "tile_budgets",
    "weighted_sums",
]
