"""Method `recoverable`: the paper's three stages, with a dynamic count or a fixed budget."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..features import MergedTokens, Sizes, TokenSelection, VisualFeatures
from ..greedy import farthest_points, herd_patches
from ..outliers import upper_outliers
from ..settings import Settings
from ..tensors import (
    cluster_means,
    constant,
    gather_rows,
    nonzero_first,
    squared_distances,
    top_mask,
)
from .budgets import BudgetSplit, budget_bounds, budget_split
from .cdpruner import largest_volume, scaled_relevance
from .contract import RecoveryMethod


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    select = _select_dynamic if settings.budget is None else _select_budget
    return select(features, features.saliency(settings.visual_heads), settings)


def _select_dynamic(features: VisualFeatures, saliency: Tensor, settings: Settings) -> TokenSelection:
    """Outliers decide how many tokens each stage keeps, tile by tile (the paper's dynamic scale filter)."""
    k, threshold, valid = settings.outlier_neighbors, settings.outlier_threshold, features.valid
    similarity = features.text_similarity
    visual = top_mask(saliency, upper_outliers(saliency, k, threshold, valid).sum(-1), valid)
    rest = valid & ~visual
    text = torch.zeros_like(visual)
    if similarity is not None:
        text = top_mask(similarity, upper_outliers(similarity, k, threshold, rest).sum(-1), rest)
        rest = rest & ~text
    centres = upper_outliers(saliency, settings.merge_neighbors, threshold, rest)
    highest = top_mask(saliency, torch.ones_like(valid[:, 0], dtype=torch.long), rest)
    centres = torch.where(centres.any(-1, keepdim=True), centres, highest)
    return features.keep(visual=visual, text=text, centres=centres, merged_counts=centres.sum(-1), saliency=saliency)


@dataclasses.dataclass
class _Shares:
    """The tokens of a fixed budget by stage, for each image.

    Args:
        visual: (I,) int64.
        text: (I,) int64.
        coverage: (I,) int64.
        merged: (I,) int64.
        most: The largest number of tokens of each stage.
        most_chosen: The largest number of tokens for text and coverage together.
        total: Tokens of an image with all patches.
    """

    visual: Tensor
    text: Tensor
    coverage: Tensor
    merged: Tensor
    most: BudgetSplit
    most_chosen: int
    total: int


def _select_budget(features: VisualFeatures, saliency: Tensor, settings: Settings) -> TokenSelection:
    """Exactly `budget` tokens per image, chosen in the order visual, text, coverage, centres.

    An image's tiles compete: saliency counts relative to the mean of its tile.
    """
    valid = features.per_image(features.valid, False)
    scores = saliency if max(features.tiles) == 1 else _relative(saliency, features.valid)
    scores, shares = features.per_image(scores, 0.0), _shares(features, settings)
    visual = _top(scores, shares.visual, valid, shares.most.visual)
    rest = valid & ~visual
    text, shares = _recover_text(features, rest, shares, settings)
    rest = rest & ~text
    coverage = _cover(features, visual | text, rest, shares, settings)
    rest = rest & ~coverage
    merged = _centres_per_tile(scores, valid, rest, shares.merged, shares.most.merged, features)
    return features.keep(
        visual=features.per_tile(visual),
        text=features.per_tile(text),
        coverage=features.per_tile(coverage),
        centres=_top(saliency, merged, features.per_tile(rest), shares.most.merged),
        merged_counts=merged,
        saliency=saliency,
        known_sizes=Sizes(shares.total, shares.most.merged, shares.total * len(saliency))
        if features.uniform
        else budget_bounds(features, settings.budget, shares.most.merged),
    )


def _shares(features: VisualFeatures, settings: Settings) -> _Shares:
    """Split the budget of every image, by its number of valid patches."""
    assert settings.budget is not None
    patches = features.valid.shape[1] * max(features.tiles)
    text_share = 0.0 if features.text_similarity is None else settings.text_share
    arguments = (patches, settings.budget, text_share, settings.coverage_share, settings.merged_tokens)
    table = _only_split if features.uniform else _split_table
    splits = table(*arguments)
    valid = features.per_image(features.valid, False)
    row = torch.zeros_like(valid[:, 0], dtype=torch.long) if features.uniform else valid.sum(-1)
    most = BudgetSplit(*map(max, zip(*splits, strict=True)))
    most_chosen = max(split.text + split.coverage for split in splits)
    visual, text, coverage, merged = constant(valid, table, *arguments)[row].unbind(-1)
    return _Shares(visual, text, coverage, merged, most, most_chosen, sum(splits[-1]))


def _recover_text(
    features: VisualFeatures, rest: Tensor, shares: _Shares, settings: Settings
) -> tuple[Tensor, _Shares]:
    """The patches that the question chooses, (I, S * N) bool, and the shares if it leaves some of its to coverage."""
    if features.text_similarity is None:
        return torch.zeros_like(rest), shares
    similarity = features.per_image(features.text_similarity, 0.0)
    if settings.text_limit != "share":
        k, threshold = settings.outlier_neighbors, settings.outlier_threshold
        outliers = upper_outliers(similarity, k, threshold, rest).sum(-1)
        limit = outliers if settings.text_limit == "outliers" else outliers // 2
        if settings.text_limit == "half_or_few":
            limit = torch.maximum(limit, _few(features.per_image(features.valid, False).sum(-1)))
        most = shares.most._replace(coverage=shares.most_chosen)
        left = (shares.text - limit).clamp(min=0)
        shares = dataclasses.replace(
            shares, text=torch.minimum(shares.text, limit), coverage=shares.coverage + left, most=most
        )
    if settings.text_by == "similarity":
        return top_mask(similarity, shares.text, rest), shares
    relevance, states = scaled_relevance(similarity, rest), features.per_image(features.hidden_states.detach(), 0.0)
    text = largest_volume(states, relevance, rest, shares.text, shares.most.text)
    return text | top_mask(relevance, shares.text - text.sum(-1), rest & ~text), shares


def _few(patches: Tensor) -> Tensor:
    """2 % of numbers of patches, rounded: (I,) int64."""
    return (patches + 25) // 50


def _cover(features: VisualFeatures, kept: Tensor, rest: Tensor, shares: _Shares, settings: Settings) -> Tensor:
    """Patches that cover the image, by place or by content: (I, S * N) bool."""
    steps = shares.most.coverage
    if not steps:
        return torch.zeros_like(rest)
    if settings.coverage_by == "content":
        states = features.per_image(features.hidden_states.detach(), 0.0)
        return herd_patches(states, features.per_image(features.valid, False), rest, shares.coverage, steps)
    distance = squared_distances(features.per_tile(kept), features.grid)
    return farthest_points(features.per_image(distance, 0), rest, shares.coverage, features.grid, steps)


def _top(scores: Tensor, counts: Tensor, candidates: Tensor, most: int) -> Tensor:
    """`top_mask`, where no count is larger than `most`."""
    return top_mask(scores, counts, candidates) if most else torch.zeros_like(candidates)


def _relative(saliency: Tensor, valid: Tensor) -> Tensor:
    """Saliency divided by the mean of its tile's valid patches."""
    total = saliency.masked_fill(~valid, 0).sum(-1, keepdim=True)
    return saliency / total.clamp(min=torch.finfo(saliency.dtype).tiny) * valid.sum(-1, keepdim=True)


def _centres_per_tile(
    scores: Tensor, valid: Tensor, rest: Tensor, counts: Tensor, most: int, features: VisualFeatures
) -> Tensor:
    """Number of an image's merged tokens that each tile gets: (T,) int64.

    In proportion to the saliency that remains in the tile, by highest averages (D'Hondt), and no more than its
    remaining patches.
    """
    tiles = max(features.tiles)
    if tiles == 1:
        return counts
    # Relative saliency adds up to the number of valid patches, so tiles that keep nothing tie exactly.
    taken = scores.masked_fill(rest | ~valid, 0).unflatten(1, (tiles, -1)).sum(-1)  # (I, S)
    mass = valid.unflatten(1, (tiles, -1)).sum(-1) - taken
    left = rest.unflatten(1, (tiles, -1)).sum(-1)
    seat = torch.arange(most, device=scores.device)
    averages = mass.unsqueeze(-1) / (seat + 1)  # (I, S, M)
    given = top_mask(averages.flatten(1), counts, (seat < left.unsqueeze(-1)).flatten(1))
    return features.per_tile(given).sum(-1)


def _only_split(
    patches: int, budget: float, text_share: float, coverage_share: float, merged: int
) -> list[BudgetSplit]:
    """`budget_split` for all patches, as the only row of a table."""
    return [budget_split(patches, budget, text_share, coverage_share, merged)]


@functools.lru_cache(maxsize=64, typed=True)  # a budget of 1 is one token, one of 1.0 is all of them
def _split_table(
    patches: int, budget: float, text_share: float, coverage_share: float, merged: int
) -> list[BudgetSplit]:
    """`budget_split` for every number of valid patches, 0 to `patches`."""
    return [budget_split(count, budget, text_share, coverage_share, merged) for count in range(patches + 1)]


def _merge(features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int) -> MergedTokens:
    """Every other patch joins the centre with the most similar key; a cluster becomes its weighted mean."""
    centres = nonzero_first(selection.centre_mask, max_merged)  # (B, M)
    cluster = torch.full_like(features.valid, -1, dtype=torch.long)
    if max_merged == 0:
        return MergedTokens(features.hidden_states[:, :0], centres, cluster)
    slot = torch.arange(max_merged, device=centres.device)  # (M,)
    with torch.no_grad():
        keys = features.keys[:, 1:].float()  # (B, N, C)
        # Which centre is nearest does not depend on the length of a patch's own key.
        similarity = torch.nn.functional.normalize(gather_rows(keys, centres), dim=-1) @ keys.transpose(1, 2)
        unused = (slot >= selection.merged_counts.unsqueeze(-1)).unsqueeze(-1)
        nearest = similarity.masked_fill(unused, -torch.inf).max(1).indices  # (B, N), the first among equals
        nearest = torch.where(selection.centre_mask, selection.centre_mask.cumsum(-1) - 1, nearest)
        member = features.valid & ~selection.kept_mask & (selection.merged_counts > 0).unsqueeze(-1)
        cluster = torch.where(member, nearest, cluster)
    tokens = cluster_means(features.hidden_states, cluster, selection.saliency, max_merged)
    return MergedTokens(tokens, centres, cluster)


RECOVERABLE = RecoveryMethod(
    _select,
    _merge,
    text="optional",
    source="Recoverable Compression (Chen et al., AAAI 2025, arXiv 2409.01179)",
)

__all__ = ["RECOVERABLE"]
