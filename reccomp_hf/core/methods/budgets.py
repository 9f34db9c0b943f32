"""What several methods need: budgets of tiles, counts out of a budget, the box plot's fence, and sums of patches."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..features import TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import positions, top_mask

FENCE = 1.5
"""Interquartile ranges above the third quartile from which on a value stands out (Tukey's box plot)."""


@dataclasses.dataclass
class Spending:
    """A fixed budget as the tiles spend it.

    Args:
        counts: (B,) int64, tokens of each tile; 0 where it keeps all its patches.
        whole: (B, N) bool, the patches of tiles that keep all of them.
        most: No entry of `counts` is larger.
        known: Tokens of every tile where they are known without looking at the device, else `None`.
    """

    counts: Tensor
    whole: Tensor
    most: int
    known: int | None

    def split(self, part: Callable[[int], int]) -> Tensor:
        """A part of each tile's tokens, by a function of their number: (B,) int64."""
        table = torch.tensor([part(count) for count in range(self.most + 1)])
        return table.to(self.counts.device, non_blocking=True)[self.counts]

    def sizes(self, part: Callable[[int], int] = lambda count: 0) -> list[int] | None:
        """`TokenSelection.known_sizes`, given the number of merged tokens of a count."""
        if self.known is None:
            return None
        return [self.known, part(self.most), self.known * len(self.counts)]


def spend(features: VisualFeatures, config: Settings) -> Spending:
    """The config's budget, tile by tile."""
    counts, most = tile_budgets(features, config)
    whole = features.valid & (counts >= features.valid.sum(-1)).unsqueeze(-1)
    uniform = features.all_valid and max(features.tiles) == 1
    keeps_all = uniform and most == features.valid.shape[1]
    counts = counts.masked_fill(whole.any(-1), 0)
    return Spending(counts, whole, 0 if keeps_all else most, most if uniform else None)


def tile_budgets(features: VisualFeatures, config: Settings) -> tuple[Tensor, int]:
    """An image's fixed budget shared out to its tiles, in proportion to their valid patches, by largest remainder.

    The published codes of most methods give every tile the same number; ours spends nothing on patches that unpadding
    removes, and the sum is exact.

    Returns:
        (B,) int64, of equal remainders the lower tile first; and a number that none of them exceeds.
    """
    patches, tiles = features.valid.shape[1], max(features.tiles)
    most = count_of(config.budget, patches * tiles)
    if features.all_valid and tiles == 1:
        return torch.full_like(features.valid[:, 0], most, dtype=torch.long), most
    own = features.per_image(features.valid.sum(-1, keepdim=True), 0)  # (I, S)
    total = own.sum(-1, keepdim=True)
    table = torch.tensor(count_table(config.budget, patches * tiles))
    budget = table.to(own.device, non_blocking=True)[total]  # (I, 1)
    exact, total = budget * own, total.clamp(min=1)
    seats, remainder = exact // total, exact % total
    seats = seats + top_mask(remainder.float(), budget.squeeze(-1) - seats.sum(-1), own > 0)
    return features.per_tile(seats).squeeze(-1), min(patches, most)


def budget_split(patches: int, budget: float, text_share: float, coverage_share: float, merged: int) -> list[int]:
    """How a fixed budget is spent on an image of that many patches.

    Returns:
        Counts of visual, text, coverage and merged tokens.
    """
    total = budget if isinstance(budget, int) else max(1, math.floor(budget * patches + 0.5))
    merged = 0 if total >= patches else min(merged, total - 1)
    total = min(total, patches)
    coverage = math.floor(coverage_share * (total - merged))
    text = math.floor(text_share * (total - merged - coverage))
    return [total - merged - coverage - text, text, coverage, merged]


def count_of(budget: float | None, patches: int) -> int:
    """Tokens that a budget gives an image of so many patches; without one all of them."""
    return patches if budget is None else sum(budget_split(patches, budget, 0, 0, 0))


@functools.lru_cache(maxsize=64, typed=True)  # a budget of 1 is a token, one of 1.0 is all of them
def count_table(budget: float | None, patches: int) -> list[int]:
    """`count_of` for 0 to so many patches."""
    return [count_of(budget, count) for count in range(patches + 1)]


def select(
    features: VisualFeatures,
    saliency: Tensor,
    *,
    visual: Tensor | None = None,
    text: Tensor | None = None,
    coverage: Tensor | None = None,
    centres: Tensor | None = None,
    extra: Tensor | None = None,
    merged_counts: Tensor | None = None,
    known_sizes: list[int] | None = None,
) -> TokenSelection:
    """A selection of which only some masks are not empty."""
    none = torch.zeros_like(features.valid)
    visual, text, coverage, centres = (none if mask is None else mask for mask in (visual, text, coverage, centres))
    merged_counts = none.sum(-1) if merged_counts is None else merged_counts
    return TokenSelection(visual, text, coverage, centres, merged_counts, saliency, known_sizes, extra)


def finest(values: Tensor) -> Tensor:
    """In float64 where the device has it, else float32."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def count_above_fence(values: Tensor, valid: Tensor) -> Tensor:
    """How many valid values of each row lie above Q3 + 1.5 (Q3 - Q1); quartiles with linear interpolation.

    Args:
        values: (B, N) float.
        valid: (B, N) bool.

    Returns:
        (B,) int64.
    """
    values = finest(values).masked_fill(~valid, torch.inf)
    ordered, last = values.sort(-1).values, (valid.sum(-1, keepdim=True) - 1).clamp(min=0)

    def quartile(number: int) -> Tensor:
        place = number * last
        below, share = place // 4, (place % 4).to(ordered.dtype) / 4
        low, high = ordered.gather(-1, below), ordered.gather(-1, torch.minimum(below + 1, last))
        return low + torch.where(share > 0, share * (high - low), 0)

    first, third = quartile(1), quartile(3)
    return ((values > third + FENCE * (third - first)) & valid).sum(-1)


def at_places(candidates: Tensor, places: Tensor, counts: Tensor) -> Tensor:
    """The candidates of each row that stand, counted among the candidates in raster order, at the given places.

    Args:
        candidates: (B, N) bool.
        places: (B, M) int64, below the number of candidates where it counts.
        counts: (B,) int64, how many of a row's places count.

    Returns:
        (B, N) bool.
    """
    beyond = candidates.shape[1]
    places = torch.where(positions(places) < counts.unsqueeze(-1), places, beyond)
    wanted = torch.zeros_like(candidates[:, :1]).expand(-1, beyond + 1).scatter(-1, places, True)
    return candidates & wanted.gather(-1, (candidates.cumsum(-1) - 1).clamp(min=0))


def weighted_sums(states: Tensor, weights: Tensor) -> Tensor:
    """Sums of patches, in float32 at least: states (B, N, C), weights (B, M, N) -> (B, M, C), as `states`."""
    precise = torch.promote_types(states.dtype, torch.float32)
    return (weights.to(precise) @ states.to(precise)).to(states.dtype)


__all__ = [
    "Spending",
    "at_places",
    "budget_split",
    "count_above_fence",
    "count_of",
    "count_table",
    "finest",
    "select",
    "spend",
    "tile_budgets",
    "weighted_sums",
]
