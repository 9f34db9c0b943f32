"""Method `recoverable`: the paper's three stages, with a dynamic count or a fixed budget."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..outliers import upper_outliers
from ..settings import Settings
from ..tensors import cluster_means, farthest_points, gather_rows, herded, nonzero_first, squared_distances, top_mask
from .budgets import budget_split
from .contract import RecoveryMethod


def _select(features: VisualFeatures, config: Settings) -> TokenSelection:
    select = _select_dynamic if config.budget is None else _select_budget
    return select(features, features.saliency(config.visual_heads), config)


def _select_dynamic(features: VisualFeatures, saliency: Tensor, config: Settings) -> TokenSelection:
    """Outliers decide how many tokens each stage keeps, tile by tile (the paper's dynamic scale filter)."""
    k, threshold, valid = config.outlier_neighbors, config.outlier_threshold, features.valid
    similarity = features.text_similarity
    visual = top_mask(saliency, upper_outliers(saliency, k, threshold, valid).sum(-1), valid)
    rest = valid & ~visual
    text = torch.zeros_like(visual)
    if similarity is not None:
        text = top_mask(similarity, upper_outliers(similarity, k, threshold, rest).sum(-1), rest)
        rest = rest & ~text
    centres = upper_outliers(saliency, config.merge_neighbors, threshold, rest)
    highest = top_mask(saliency, torch.ones_like(valid[:, 0], dtype=torch.long), rest)
    centres = torch.where(centres.any(-1, keepdim=True), centres, highest)
    return TokenSelection(visual, text, torch.zeros_like(visual), centres, centres.sum(-1), saliency)


def _select_budget(features: VisualFeatures, saliency: Tensor, config: Settings) -> TokenSelection:
    """Exactly `budget` tokens per image, chosen in the order visual, text, coverage, centres.

    An image's tiles compete: saliency counts relative to the mean of its tile.
    """
    has_text, patches = features.text_similarity is not None, features.valid.shape[1] * max(features.tiles)
    valid = features.per_image(features.valid, False)
    scores = features.per_image(_relative(saliency, features.valid) if max(features.tiles) > 1 else saliency, 0.0)
    similarity = scores if features.text_similarity is None else features.per_image(features.text_similarity, 0.0)
    shares = (config.text_share if has_text else 0.0, config.coverage_share, config.merged_tokens)
    uniform = features.all_valid and max(features.tiles) == 1
    assert config.budget is not None
    splits = (
        [budget_split(patches, config.budget, *shares)] if uniform else _split_table(patches, config.budget, *shares)
    )
    row = torch.zeros_like(valid[:, 0], dtype=torch.long) if uniform else valid.sum(-1)
    table = torch.tensor(splits).to(scores.device, non_blocking=True)
    n_visual, n_text, n_coverage, n_merged = table[row].unbind(-1)
    visual = top_mask(scores, n_visual, valid)
    rest = valid & ~visual
    steps = max(split[2] for split in splits)
    if has_text and config.text_limit == "outliers":
        outliers = upper_outliers(similarity, config.outlier_neighbors, config.outlier_threshold, rest).sum(-1)
        n_coverage = n_coverage + (n_text - outliers).clamp(min=0)
        n_text, steps = torch.minimum(n_text, outliers), max(split[1] + split[2] for split in splits)
    text = top_mask(similarity, n_text, rest)
    rest = rest & ~text
    coverage = torch.zeros_like(rest)
    if steps and config.coverage_by == "content":
        units = torch.nn.functional.normalize(features.hidden_states.detach().float(), dim=-1)
        coverage = herded(features.per_image(units, 0.0), valid, rest, n_coverage, steps)
    elif steps:
        distance = squared_distances(features.per_tile(visual | text), features.grid)
        coverage = farthest_points(features.per_image(distance, 0), rest, n_coverage, features.grid, steps)
    rest = rest & ~coverage
    most_merged = max(split[3] for split in splits)
    merged = _centres_per_tile(scores, valid, rest, n_merged, most_merged, features)
    rest = features.per_tile(rest)
    most = sum(splits[-1])
    return TokenSelection(
        visual_mask=features.per_tile(visual),
        text_mask=features.per_tile(text),
        coverage_mask=features.per_tile(coverage),
        centre_mask=top_mask(saliency, merged, rest),
        merged_counts=merged,
        saliency=saliency,
        known_sizes=[most, most_merged, most * len(saliency)] if uniform else None,
    )


def _relative(saliency: Tensor, valid: Tensor) -> Tensor:
    """Saliency over the mean of a tile's valid patches."""
    total = saliency.masked_fill(~valid, 0).sum(-1, keepdim=True)
    return saliency / total.clamp(min=torch.finfo(saliency.dtype).tiny) * valid.sum(-1, keepdim=True)


def _centres_per_tile(
    scores: Tensor, valid: Tensor, rest: Tensor, counts: Tensor, most: int, features: VisualFeatures
) -> Tensor:
    """How many of an image's merged tokens each tile gets: (T,) int64.

    In proportion to the saliency that remains in it, by highest averages (D'Hondt), and no more than its remaining
    patches.
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


@functools.lru_cache(maxsize=64, typed=True)  # a budget of 1 is a token, one of 1.0 is all of them
def _split_table(
    patches: int, budget: float, text_share: float, coverage_share: float, merged: int
) -> list[list[int]]:
    """`budget_split` for every number of valid patches, 0 to `patches`."""
    return [budget_split(count, budget, text_share, coverage_share, merged) for count in range(patches + 1)]


def _merge(features: VisualFeatures, selection: TokenSelection, config: Settings, max_merged: int) -> MergedTokens:
    """Every patch that was not kept joins the centre of most similar key; a cluster becomes its weighted mean."""
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
        nearest = similarity.masked_fill(unused, -torch.inf).max(1).indices  # (B, N), first of equals
        nearest = torch.where(selection.centre_mask, selection.centre_mask.cumsum(-1) - 1, nearest)
        member = features.valid & ~selection.kept_mask & (selection.merged_counts > 0).unsqueeze(-1)
        cluster = torch.where(member, nearest, cluster)
    tokens = cluster_means(features.hidden_states, cluster, selection.saliency, max_merged)
    return MergedTokens(tokens, centres, cluster)


RECOVERABLE = RecoveryMethod(
    _select,
    _merge,
    reads_text=True,
    source="Recoverable Compression (Chen et al., AAAI 2025, arXiv 2409.01179)",
)

__all__ = ["RECOVERABLE"]
