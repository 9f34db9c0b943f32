"""The method: scores and features in, the few tokens that stand for an image out.

Recoverable Compression (Chen et al., AAAI 2025, arXiv 2409.01179): the class token's attention keeps the salient
patches, the question recovers further ones, and what remains is clustered and merged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .configuration import TokenRecoveryConfig
from .features import TokenRecoveryOutput, TokenSelection, VisualFeatures
from .methods.registry import get_method
from .tensors import full_precision, gather_rows, nonzero_first


def recover_tokens(
    hidden_states: Tensor,
    class_query: Tensor,
    keys: Tensor,
    text_similarity: Tensor | None,
    config: TokenRecoveryConfig,
    *,
    num_heads: int = 1,
    grid: tuple[int, int] | None = None,
    valid: Tensor | None = None,
    tiles: list[int] | None = None,
    projected: Tensor | None = None,
) -> TokenRecoveryOutput:
    """Choose, recover and merge the visual tokens of a batch of images.

    Args:
        hidden_states: (B, N, C) patches only, any floating dtype; what LLaVA's projector reads.
        class_query: (B, C), the class token's query.
        keys: (B, N + 1, C), class token first.
        text_similarity: (B, N), higher means more relevant to the question; `None` for a visual-only choice.
        config: The method and its settings.
        num_heads: Attention heads of the vision tower, read by `visual_heads="mean"`.
        grid: (rows, columns) of the patches; `None` takes them for a square.
        valid: (B, N) bool, `False` for patches that do not exist; `None` means that all do. A row with fewer valid
            patches than an int budget keeps all of them.
        tiles: Consecutive rows that each image has, where an image is cut into tiles: they share a fixed budget.
            `None` takes every row for an image. An image with fewer patches than an int budget keeps all of them.
        projected: (B, N, D), LLaVA's projected features of all patches, for a method that `reads_projected`.

    Returns:
        A [`TokenRecoveryOutput`]; kept and merged tokens are differentiable in `hidden_states`, the choice is not.
        In dynamic mode (budget `None`) one value is read from the device.

    Raises:
        ValueError: Shapes that do not fit, a budget above the number of patches, a method without its question or
            its projected features.
    """
    features = check_features(
        hidden_states,
        class_query,
        keys,
        text_similarity,
        config,
        num_heads=num_heads,
        grid=grid,
        valid=valid,
        tiles=tiles,
        projected=projected,
    )
    selection = select_tokens(features, config)
    sizes = selection.known_sizes or selection.sizes.tolist()
    return assemble_tokens(features, selection, config, sizes)


def check_features(
    hidden_states: Tensor,
    class_query: Tensor,
    keys: Tensor,
    text_similarity: Tensor | None,
    config: TokenRecoveryConfig,
    *,
    num_heads: int = 1,
    grid: tuple[int, int] | None = None,
    valid: Tensor | None = None,
    tiles: list[int] | None = None,
    projected: Tensor | None = None,
) -> VisualFeatures:
    """Check shapes and settings against each other, see [`recover_tokens`]; nothing is read from the device."""
    batch, patches, width = _shape(hidden_states)
    for name, tensor, needed in (
        ("class_query", class_query, (batch, width)),
        ("keys", keys, (batch, patches + 1, width)),
        ("text_similarity", text_similarity, (batch, patches)),
        ("valid", valid, (batch, patches)),
    ):
        if tensor is not None and tuple(tensor.shape) != needed:
            raise ValueError(
                f"{name} must have shape {needed} beside hidden_states of shape {tuple(hidden_states.shape)}, got "
                f"{tuple(tensor.shape)}" + ("; keys start with the class token." if name == "keys" else ".")
            )
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the width {width}, got {num_heads}.")
    tiles = [1] * batch if tiles is None else tiles
    if sum(tiles) != batch:
        raise ValueError(f"tiles must add up to the {batch} rows of hidden_states, got {tiles}.")
    if max(tiles) == 1:  # an image of few tiles keeps all its patches where a budget is larger
        check_budget(config, patches)
    if text_similarity is None and get_method(config.method).needs_text:
        raise ValueError(f"Method {config.method!r} needs a question: text_similarity is None.")
    if projected is None and get_method(config.method).reads_projected:
        raise ValueError(f"Method {config.method!r} reads LLaVA's projected features: projected is None.")
    if projected is not None and (projected.ndim != 3 or tuple(projected.shape[:2]) != (batch, patches)):
        raise ValueError(f"projected must have shape ({batch}, {patches}, D), got {tuple(projected.shape)}.")
    return VisualFeatures(
        hidden_states=hidden_states,
        class_query=class_query.detach(),
        keys=keys.detach(),
        text_similarity=None if text_similarity is None else text_similarity.detach().float(),
        num_heads=num_heads,
        grid=_grid(grid, patches, config),
        valid=keys.new_ones((batch, patches), dtype=torch.bool) if valid is None else valid,
        all_valid=valid is None,
        tiles=tiles,
        projected=None if projected is None else projected.detach(),
    )


def check_budget(config: TokenRecoveryConfig, patches: int) -> None:
    """Refuse an int budget above the number of patches that an image can have.

    Raises:
        ValueError: The budget is larger.
    """
    if isinstance(config.budget, int) and config.budget > patches:
        raise ValueError(
            f"token_recovery.budget is {config.budget}, but an image has only {patches} patches; "
            f"write an int up to {patches} or a share in (0, 1]."
        )


@torch.no_grad()
def select_tokens(features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    """The method's choice of patches; reads nothing from the device."""
    with full_precision(features.keys):
        return get_method(config.method).select(features, config)


def assemble_tokens(
    features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, sizes: list[int]
) -> TokenRecoveryOutput:
    """Gather the kept tokens, append the merged ones, and note where every patch went; `sizes` as read."""
    kept = selection.kept_mask
    max_tokens, max_merged, _ = sizes
    with full_precision(features.keys):
        merged = get_method(config.method).merge(features, selection, config, max_merged)
    kept_counts, counts = kept.sum(-1, keepdim=True), selection.counts.unsqueeze(-1)  # (B, 1)
    slot = torch.arange(max_tokens, device=kept.device).expand(kept.shape[0], -1)  # (B, K)
    kept_places = nonzero_first(kept, max_tokens)
    tokens, places, after = gather_rows(features.hidden_states, kept_places), kept_places, slot - kept_counts
    if max_merged:
        # Behind the kept ones: the merged ones, then nothing.
        which = after.clamp(min=0, max=max_merged - 1)
        nothing_behind = torch.nn.functional.pad(merged.tokens, (0, 0, 0, 1))  # (B, M + 1, C)
        merged_tokens = gather_rows(nothing_behind, torch.where(slot < counts, which, max_merged))
        tokens = torch.where((after < 0).unsqueeze(-1), tokens, merged_tokens)
        places = torch.where(after < 0, places, merged.places.gather(1, which))
    else:
        tokens = tokens.masked_fill((after >= 0).unsqueeze(-1), 0)
    places = places.masked_fill(slot >= counts, -1)
    cluster = torch.where(merged.cluster >= 0, kept_counts + merged.cluster, merged.cluster)
    cluster = torch.where(kept, kept.cumsum(-1) - 1, cluster)
    return TokenRecoveryOutput(
        tokens=tokens,
        counts=selection.counts,
        visual_mask=selection.visual_mask,
        text_mask=selection.text_mask,
        coverage_mask=selection.coverage_mask,
        centre_mask=selection.centre_mask,
        cluster=cluster,
        places=places,
        saliency=selection.saliency,
        text_similarity=features.text_similarity,
    )


def _shape(hidden_states: Tensor) -> tuple[int, int, int]:
    if hidden_states.ndim != 3 or hidden_states.shape[1] == 0:
        raise ValueError(f"hidden_states must have shape (B, N, C) with N > 0, got {tuple(hidden_states.shape)}.")
    batch, patches, width = hidden_states.shape
    return batch, patches, width


def _grid(grid: tuple[int, int] | None, patches: int, config: TokenRecoveryConfig) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        square = side * side == patches
        if not square and config.budget is not None and config.coverage_share > 0 and config.coverage_by == "place":
            raise ValueError(f"coverage_share needs the grid of the {patches} patches, no square: pass grid=.")
        return (side, side) if square else (1, patches)
    if grid[0] * grid[1] != patches:
        raise ValueError(f"grid {tuple(grid)} has {grid[0] * grid[1]} cells, but there are {patches} patches.")
    return grid


__all__ = ["assemble_tokens", "check_budget", "check_features", "recover_tokens", "select_tokens"]
