"""Methods `prumerge` and `prumerge_plus`: salient patches, each with its nearest neighbours added to it.

LLaVA-PruMerge (Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv
2403.15388). The number of centres follows from the box plot's fence over the class token's attention, or from a
budget. `prumerge_plus` adds evenly spread centres.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import gather_rows, nonzero_first, positions, top_mask
from .budgets import Spending, at_places, count_above_fence, spend, weighted_sums
from .contract import SALIENCY, RecoveryMethod, check_int, check_share


@dataclasses.dataclass(frozen=True)
class PruMergeOptions:
    """Options of `prumerge`.

    Args:
        neighbors: An int >= 1, patches of similar key that are added to each centre.
    """

    neighbors: int = 32

    def __post_init__(self) -> None:
        """Check the number of neighbours."""
        check_int("neighbors", self.neighbors, 1)


@dataclasses.dataclass(frozen=True)
class PruMergePlusOptions(PruMergeOptions):
    """Options of `prumerge_plus`.

    Args:
        neighbors: As in `prumerge`.
        uniform_share: A number in [0, 1], the share of a fixed budget's centres that are spread evenly.
    """

    uniform_share: float = 0.5

    def __post_init__(self) -> None:
        """Check both."""
        super().__post_init__()
        check_share("uniform_share", self.uniform_share)


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, valid = features.saliency(settings.visual_heads), features.valid
    if settings.budget is None:
        return _with_extra(features, saliency, top_mask(saliency, _outliers(saliency, valid), valid))
    spending = spend(features, settings)
    return _with_extra(features, saliency, top_mask(saliency, spending.split(_centres), valid), spending)


def _select_plus(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, valid = features.saliency(settings.visual_heads), features.valid
    if settings.budget is None:
        counts, patches = _outliers(saliency, valid), valid.sum(-1)
        step = (patches // counts.clamp(min=1) // 3).clamp(min=1).unsqueeze(-1)
        place = valid.cumsum(-1) - 1
        # As in the published code, the last patch is not among the evenly spread ones.
        spread = valid & (place % step == 0) & (place < (patches - 1).unsqueeze(-1))
        return _with_extra(features, saliency, spread | top_mask(saliency, counts, valid))
    spending, share = spend(features, settings), settings.options.uniform_share
    # Deviation: the paper derives the number of spread centres from its outliers and does not split a given total;
    # half of the centres each way is a guess. More spread centres cover more and follow the attention less.
    spread_counts = spending.split(lambda count: math.floor(share * _centres(count)))
    salient = top_mask(saliency, spending.split(_centres) - spread_counts, valid)
    rest, counts = valid & ~salient, spread_counts.unsqueeze(-1)
    middle = 2 * torch.arange(spending.most, device=valid.device) + 1  # of equal stretches
    places = middle * rest.sum(-1, keepdim=True) // (2 * counts).clamp(min=1)  # (B, M)
    spread = at_places(rest, places, spread_counts)
    return _with_extra(features, saliency, salient | spread, spending)


def _outliers(saliency: Tensor, valid: Tensor) -> Tensor:
    """(B,) int64, at least one where a patch exists."""
    # Deviation: without outliers the published code of PruMerge keeps the extra token alone and that of PruMerge+
    # divides by zero; and it counts a batch's outliers together, where this counts each image's own.
    return torch.minimum(count_above_fence(saliency, valid).clamp(min=1), valid.sum(-1))


def _centres(count: int) -> int:
    """Number of centres among `count` tokens; one of several tokens is the extra one."""
    return count - 1 if count > 1 else count


def _with_extra(
    features: VisualFeatures, saliency: Tensor, centres: Tensor, spending: Spending | None = None
) -> TokenSelection:
    """The selection with the extra token's place, the most salient patch that is not a centre."""
    rest, counts = features.valid & ~centres, centres.sum(-1)
    has_extra = rest.any(-1) if spending is None else spending.counts > 1
    extra = top_mask(saliency, has_extra.long(), rest)
    return features.keep(
        saliency=saliency,
        visual=None if spending is None else spending.whole,
        centres=centres | extra,
        extra=extra,
        merged_counts=counts + has_extra,
        known_sizes=None if spending is None else spending.sizes(lambda count: count),
    )


def _merge(features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int) -> MergedTokens:
    return _merge_around(features, selection, settings, max_merged, selection.centre_mask)


def _merge_plus(
    features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int
) -> MergedTokens:
    saliency, valid = selection.saliency, features.valid
    if settings.budget is None:
        counts = _outliers(saliency, valid)
    else:
        spending, share = spend(features, settings), settings.options.uniform_share
        counts = spending.split(lambda count: _centres(count) - math.floor(share * _centres(count)))
    return _merge_around(features, selection, settings, max_merged, top_mask(saliency, counts, valid))


def _merge_around(
    features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int, salient: Tensor
) -> MergedTokens:
    """Each centre plus its neighbours, weighted by their raw attention; then the sum of all other patches.

    The salient centres come first, in falling attention, then the spread ones in raster order; with positions
    `"original"` all of them are in raster order.
    """
    extra = selection.extra_mask
    assert extra is not None
    centre = selection.centre_mask & ~extra
    salient = salient & (settings.position_ids != "original")
    rank = torch.where(salient, selection.saliency, -1.0 - positions(centre)).masked_fill(~centre, -torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)  # (B, N), the centres first
    slots = torch.empty_like(order).scatter_(-1, order, positions(order))
    counts, places = centre.sum(-1, keepdim=True), order[:, :max_merged]  # (B, 1), (B, M)
    places = torch.nn.functional.pad(places, (0, max_merged - places.shape[1]))
    cluster = torch.where(centre, slots, torch.where(extra, counts, -1))
    if max_merged == 0:
        return MergedTokens(features.hidden_states[:, :0], places, cluster)
    with torch.no_grad():
        itself = positions(centre).unsqueeze(1) == places.unsqueeze(-1)  # (B, M, N)
        keys = normalize(features.keys[:, 1:].float(), dim=-1)
        score = gather_rows(keys, places) @ keys.transpose(1, 2)  # (B, M, N)
        others = (features.valid.unsqueeze(1) & ~itself).flatten(0, 1)
        neighbors = torch.full_like(others[:, 0], settings.options.neighbors, dtype=torch.long)
        near = top_mask(score.flatten(0, 1), neighbors, others).view_as(score)
        rest = (features.valid & ~centre).unsqueeze(1)  # (B, 1, N)
        is_centre = (positions(places) < counts).unsqueeze(-1)  # (B, M, 1)
        saliency = selection.saliency.unsqueeze(1)
        weights = torch.where(is_centre, near * saliency + itself, rest * saliency)
        places = torch.where(positions(places) == counts, nonzero_first(extra, 1), places)
    return MergedTokens(weighted_sums(features.hidden_states, weights), places, cluster)


# The published code reads the last block, with one softmax over the full width.
_DEFAULTS = {"visual_layer": -1, "visual_heads": "joint"}
PRUMERGE = RecoveryMethod(
    _select,
    _merge,
    defaults=_DEFAULTS,
    options=PruMergeOptions,
    shares_patches=True,
    fields=SALIENCY,
    source="LLaVA-PruMerge (Shang et al., arXiv 2403.15388)",
)
PRUMERGE_PLUS = dataclasses.replace(
    PRUMERGE,
    select=_select_plus,
    merge=_merge_plus,
    options=PruMergePlusOptions,
    source="LLaVA-PruMerge+ (Shang et al., arXiv 2403.15388)",
)

__all__ = ["PRUMERGE", "PRUMERGE_PLUS"]
