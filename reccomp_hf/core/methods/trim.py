"""Method `trim`: the patches most similar to the question, and the mean of all others.

TRIM (Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs", arXiv
2409.10994). The number of patches follows from the box plot's fence over the softmax of CLIP's similarities, or from a
budget.
"""

from __future__ import annotations

import torch

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import cluster_means, highest_precision, nonzero_first, top_mask
from .budgets import count_above_fence, spend
from .contract import METHOD_FIELDS, RecoveryMethod


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, similarity, valid = features.saliency(settings.visual_heads), features.text_similarity, features.valid
    assert similarity is not None
    if settings.budget is None:
        shares = highest_precision(similarity).masked_fill(~valid, -torch.inf).softmax(-1)
        text = top_mask(similarity, count_above_fence(shares, valid).clamp(min=1), valid)
        whole, has_mean_tokens, known_sizes = None, (valid & ~text).any(-1), None
    else:
        spending = spend(features, settings)
        text = top_mask(similarity, spending.split(lambda count: count - _mean_tokens(count)), valid)
        whole, has_mean_tokens, known_sizes = spending.whole, spending.counts > 1, spending.sizes(_mean_tokens)
    return features.keep(
        saliency=saliency,
        visual=whole,
        text=text,
        centres=top_mask(saliency, has_mean_tokens.long(), valid & ~text),
        merged_counts=has_mean_tokens.long(),
        known_sizes=known_sizes,
    )


def _mean_tokens(count: int) -> int:
    """1 if a token is reserved for the mean of the dropped patches, else 0."""
    return int(count > 1)


def _merge(features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int) -> MergedTokens:
    dropped = features.valid & ~selection.kept_mask & (selection.merged_counts > 0).unsqueeze(-1)
    cluster = dropped.long() - 1
    tokens = cluster_means(features.hidden_states, cluster, torch.ones_like(selection.saliency), max_merged)
    return MergedTokens(tokens, nonzero_first(selection.centre_mask, max_merged), cluster)


TRIM = RecoveryMethod(
    _select,
    _merge,
    text="required",
    defaults={"text_relevance": "penultimate", "text_relevance_sign": -1},
    fields=METHOD_FIELDS,  # saliency says where the mean of the dropped patches stands
    source="TRIM (Song et al., arXiv 2409.10994)",
)

__all__ = ["TRIM"]
