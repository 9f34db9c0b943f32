"""Method `trim`: the patches nearest to the question, and one mean of all others.

TRIM (Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs", arXiv
2409.10994). How many patches stay is said by the box plot's fence over the softmax of CLIP's similarities, or by a
budget.
"""

from __future__ import annotations

import torch

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import cluster_means, nonzero_first, top_mask
from .budgets import count_above_fence, finest, select, spend
from .contract import METHOD_FIELDS, RecoveryMethod


def _select(features: VisualFeatures, config: Settings) -> TokenSelection:
    saliency, similarity, valid = features.saliency(config.visual_heads), features.text_similarity, features.valid
    assert similarity is not None
    if config.budget is None:
        shares = finest(similarity).masked_fill(~valid, -torch.inf).softmax(-1)
        text = top_mask(similarity, count_above_fence(shares, valid).clamp(min=1), valid)
        whole, has_extra, known_sizes = None, (valid & ~text).any(-1), None
    else:
        spending = spend(features, config)
        text = top_mask(similarity, spending.split(lambda count: count - _extra(count)), valid)
        whole, has_extra, known_sizes = spending.whole, spending.counts > 1, spending.sizes(_extra)
    return select(
        features,
        saliency,
        visual=whole,
        text=text,
        centres=top_mask(saliency, has_extra.long(), valid & ~text),
        merged_counts=has_extra.long(),
        known_sizes=known_sizes,
    )


def _extra(count: int) -> int:
    """Whether one of so many tokens is the mean of the dropped patches."""
    return int(count > 1)


def _merge(features: VisualFeatures, selection: TokenSelection, config: Settings, max_merged: int) -> MergedTokens:
    dropped = features.valid & ~selection.kept_mask & (selection.merged_counts > 0).unsqueeze(-1)
    cluster = dropped.long() - 1
    tokens = cluster_means(features.hidden_states, cluster, torch.ones_like(selection.saliency), max_merged)
    return MergedTokens(tokens, nonzero_first(selection.centre_mask, max_merged), cluster)


TRIM = RecoveryMethod(
    _select,
    _merge,
    reads_text=True,
    needs_text=True,
    defaults={"text_relevance": "penultimate", "text_relevance_sign": -1},
    fields=METHOD_FIELDS,  # saliency says where the mean of the dropped patches stands
    source="TRIM (Song et al., arXiv 2409.10994)",
)

__all__ = ["TRIM"]
