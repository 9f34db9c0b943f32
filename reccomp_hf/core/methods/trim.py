"""Method `trim`: the patches most similar to the question, and the mean of all others.

TRIM (Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs", arXiv
2409.10994). The number of patches follows from the box plot's fence over the softmax of the products, or from a
budget.

Deviation: patches are ordered by their products; the published code orders by the softmax, which is 0 in float32 for a
product 104 below the largest, and takes any of those.
"""

from __future__ import annotations

import dataclasses

import torch

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings, shown
from ..tensors import cluster_means, nonzero_first, top_mask
from .budgets import count_above_fence, spend
from .contract import METHOD_FIELDS, RecoveryMethod

SIMILARITIES = ("dot", "cosine")


@dataclasses.dataclass(frozen=True)
class TrimOptions:
    """Options of `trim`.

    Args:
        similarity: `"dot"`, products of patches and question as CLIP projects them, as in the published code; or
            `"cosine"`. The number of outliers without a budget depends on it.
    """

    similarity: str = "dot"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be 'dot' or 'cosine', got {shown(self.similarity)}.")


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, similarity, valid = features.saliency(settings.visual_heads), features.text_similarity, features.valid
    assert similarity is not None
    if settings.budget is None:
        shares = similarity.masked_fill(~valid, -torch.inf).softmax(-1)
        # Deviation: without outliers the published code keeps the mean alone; and it counts a batch's together.
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
    options=TrimOptions,
    fields=METHOD_FIELDS,  # saliency says where the mean of the dropped patches stands
    source="TRIM (Song et al., arXiv 2409.10994)",
)

__all__ = ["TRIM"]
