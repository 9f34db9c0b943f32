"""Comparison settings that look at no score: average pooling of the grid, and LLaVA-NeXT's base tile alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .configuration_reccomp import TokenRecoveryConfig
from .recovery import MergedTokens, RecoveryMethod, TokenSelection, VisualFeatures
from .selection import cluster_means, nonzero_first


def _select_pooling(side: int, features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    """Every cell of side x side patches becomes its mean; its first patch stands for it."""
    none = torch.zeros_like(features.valid)
    cell = _cells(side, features)
    index = torch.arange(cell.shape[0], device=cell.device).expand_as(none)
    beyond, cells = cell.shape[0], _cell_count(side, features)
    lowest = index.new_full((len(index), cells), beyond)
    lowest = lowest.scatter_reduce(1, cell.expand_as(index), index.masked_fill(~features.valid, beyond), "amin")
    centres = features.valid & (lowest.gather(1, cell.expand_as(index)) == index)
    known = [cells, cells, cells * len(none)] if features.all_valid else None
    return TokenSelection(none, none, none, centres, centres.sum(-1), features.saliency(config.visual_heads), known)


def _merge_pooling(
    side: int, features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, max_merged: int
) -> MergedTokens:
    cell = _cells(side, features).expand_as(features.valid)
    rank = selection.centre_mask.cumsum(-1) - 1
    of_cell = rank.new_zeros((len(rank), _cell_count(side, features)))
    of_cell = of_cell.scatter_reduce(1, cell, rank.masked_fill(~selection.centre_mask, -1), "amax", include_self=False)
    cluster = of_cell.gather(1, cell).masked_fill(~features.valid, -1)
    tokens = cluster_means(features.hidden_states, cluster, torch.ones_like(selection.saliency), max_merged)
    return MergedTokens(tokens, nonzero_first(selection.centre_mask, max_merged), cluster)


def _select_base_tile(features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    """The first tile of each image as it is, the others dropped."""
    none = torch.zeros_like(features.valid)
    is_base = torch.tensor([tile == 0 for size in features.tiles for tile in range(size)])
    is_base = is_base.to(none.device, non_blocking=True)
    kept = features.valid & is_base.unsqueeze(-1)
    return TokenSelection(
        kept, none, none, none, torch.zeros_like(none.sum(-1)), features.saliency(config.visual_heads)
    )


def _merge_nothing(
    features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, max_merged: int
) -> MergedTokens:
    dropped = torch.full_like(features.valid, -1, dtype=torch.long)
    return MergedTokens(features.hidden_states[:, :0], dropped[:, :0], dropped)


def _cells(side: int, features: VisualFeatures) -> Tensor:
    """(N,) int64, the cell that each patch of the grid belongs to."""
    rows, columns = features.grid
    patch = torch.arange(rows * columns, device=features.valid.device)
    return patch // columns // side * -(-columns // side) + patch % columns // side


def _cell_count(side: int, features: VisualFeatures) -> int:
    rows, columns = features.grid
    return -(-rows // side) * -(-columns // side)


def _pooling(side: int) -> RecoveryMethod:
    return RecoveryMethod(functools.partial(_select_pooling, side), functools.partial(_merge_pooling, side))


POOLING_2X2, POOLING_3X3 = _pooling(2), _pooling(3)
BASE_TILE = RecoveryMethod(_select_base_tile, _merge_nothing)

__all__ = ["BASE_TILE", "POOLING_2X2", "POOLING_3X3"]
