"""The choice of tokens: features in, the few tokens that stand for an image out.

Recoverable Compression (Chen et al., AAAI 2025, arXiv 2409.01179): the class token's attention keeps the salient
patches, the question recovers further ones, and the rest is clustered and merged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .configuration import TokenRecoveryConfig
from .features import Sizes, TokenRecoveryOutput, TokenSelection, VisualFeatures
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
    received: Tensor | None = None,
    class_state: Tensor | None = None,
    word_similarity: Tensor | None = None,
) -> TokenRecoveryOutput:
    """Choose, recover and merge the visual tokens of a batch of images.

    Args:
        hidden_states: (B, N, C) patches without the class token, any floating dtype, as LLaVA's projector reads them.
        class_query: (B, C), the class token's query.
        keys: (B, N + 1, C), class token first.
        text_similarity: (B, N), higher means more relevant to the question; `None` for a visual-only choice.
        config: The method and its settings.
        num_heads: Attention heads of the vision tower, read by `visual_heads="mean"`.
        grid: (rows, columns) of the patches; `None` means a square.
        valid: (B, N) bool, `False` for patches that do not exist; `None` means that all do. A row with fewer valid
            patches than an int budget keeps all of them.
        tiles: Number of consecutive rows of each image, if images are cut into tiles: they share a fixed budget.
            `None` means that every row is an image. An image with fewer patches than an int budget keeps all of them.
        projected: (B, N, D), LLaVA's projected features of all patches, for a method that `reads_projected`.
        received: (B, 2, N), the attention that patches receive in two blocks, for a method with an `object_block`.
        class_state: (B, C), the class token as LLaVA's projector would read it, for a method that
            `reads_class_token`.
        word_similarity: (B, M, N), cosines of the question's words with projected patches, -inf in the rows of
            padding, for a method that `reads_words`.

    Returns:
        A [`TokenRecoveryOutput`]; kept and merged tokens are differentiable in `hidden_states`, the choice is not.
        In dynamic mode (budget `None`) one value is read from the device.

    Raises:
        ValueError: Shapes that do not fit, a budget above the number of patches, a method without its question,
            its projected features, the attention that patches receive, the class token or the question's words.
    """
    features = VisualFeatures(
        hidden_states,
        class_query,
        keys,
        text_similarity,
        num_heads,
        grid,  # type: ignore[arg-type]  # None is completed
        valid,  # type: ignore[arg-type]
        tiles,  # type: ignore[arg-type]
        projected,
        received,
        class_state,
        word_similarity,
    )
    covers_by_place = config.budget is not None and config.coverage_share > 0 and config.coverage_by == "place"
    if grid is None and covers_by_place and math.isqrt(hidden_states.shape[1]) ** 2 != hidden_states.shape[1]:
        patches = hidden_states.shape[1]
        raise ValueError(
            f"coverage_share needs the grid of the {patches} patches, which are not a square: pass grid=."
        )
    check_features(features, config)
    selection = select_tokens(features, config)
    return assemble_tokens(features, selection, config, selection.read_sizes())


def check_features(features: VisualFeatures, config: TokenRecoveryConfig) -> None:
    """Check features against settings; nothing is read from the device.

    Raises:
        ValueError: A budget above the number of patches, a method without the features that it reads.
    """
    method = get_method(config.method)
    if max(features.tiles) == 1:  # an image with few tiles keeps all its patches if the budget is larger
        check_budget(config, features.valid.shape[1])
    if features.word_similarity is None and method.reads_words:
        raise ValueError(f"Method {config.method!r} needs a question's words: word_similarity is None.")
    if features.text_similarity is None and method.text == "required" and not method.reads_words:
        raise ValueError(f"Method {config.method!r} needs a question: text_similarity is None.")
    if features.projected is None and method.reads_projected:
        raise ValueError(f"Method {config.method!r} reads LLaVA's projected features: projected is None.")
    if features.received is None and method.object_block is not None:
        raise ValueError(f"Method {config.method!r} reads the attention that patches receive: received is None.")
    if features.class_state is None and method.reads_class_token:
        raise ValueError(f"Method {config.method!r} reads the class token: class_state is None.")


def check_budget(config: TokenRecoveryConfig, patches: int, name: str = "token_recovery") -> None:
    """Refuse an int budget above the number of patches that an image can have; `name` is the section's, for errors.

    Raises:
        ValueError: The budget is larger.
    """
    if isinstance(config.budget, int) and config.budget > patches:
        raise ValueError(
            f"{name}.budget is {config.budget}, but an image has only {patches} patches; "
            f"write an int up to {patches} or a share in (0, 1]."
        )


@torch.no_grad()
def select_tokens(features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    """The method's choice of patches; nothing is read from the device."""
    with full_precision(features.keys):
        return get_method(config.method).select(features, config)


def assemble_tokens(
    features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, sizes: Sizes
) -> TokenRecoveryOutput:
    """Gather the kept tokens, append the merged ones, and record where every patch went.

    Args:
        features: The features that the choice was made from.
        selection: The choice.
        config: The method and its settings.
        sizes: The selection's sizes, as read from the device.
    """
    kept = selection.kept_mask
    with full_precision(features.keys):
        merged = get_method(config.method).merge(features, selection, config, sizes.most_merged)
    kept_counts, counts = kept.sum(-1, keepdim=True), selection.counts.unsqueeze(-1)  # (B, 1)
    slot = torch.arange(sizes.longest, device=kept.device).expand(kept.shape[0], -1)  # (B, K)
    kept_places = nonzero_first(kept, sizes.longest)
    merged_cluster, kept_cluster, after = kept_counts + merged.cluster, kept.cumsum(-1) - 1, slot - kept_counts
    if selection.leading_counts is not None:
        leading = selection.leading_counts.unsqueeze(-1)
        kept_places, kept_cluster = kept_places.gather(1, (slot - leading).clamp(min=0)), kept_cluster + leading
        after = torch.where(slot < leading, slot, torch.where(after < leading, -1, after))
    tokens, places = gather_rows(features.hidden_states, kept_places), kept_places
    if sizes.most_merged:
        # Where no kept token stands: the merged ones, then zeros.
        which = after.clamp(min=0, max=sizes.most_merged - 1)
        padded = torch.nn.functional.pad(merged.tokens, (0, 0, 0, 1))  # (B, M + 1, C)
        merged_tokens = gather_rows(padded, torch.where(slot < counts, which, sizes.most_merged))
        tokens = torch.where((after < 0).unsqueeze(-1), tokens, merged_tokens)
        places = torch.where(after < 0, places, merged.places.gather(1, which))
    else:
        tokens = tokens.masked_fill((after >= 0).unsqueeze(-1), 0)
    places = places.masked_fill(slot >= counts, -1)
    cluster = torch.where(merged.cluster >= 0, merged_cluster, merged.cluster)
    cluster = torch.where(kept, kept_cluster, cluster)
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


__all__ = ["assemble_tokens", "check_budget", "check_features", "recover_tokens", "select_tokens"]
