"""Method `cdpruner`: patches that are relevant to the question and unlike each other.

CDPruner (Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
arXiv 2506.10967): a determinantal point process over LLaVA's projected features, conditioned on CLIP's relevance; its
most likely set is found greedily (Chen, Zhang & Zhou, "Fast Greedy MAP Inference for Determinantal Point Process",
NeurIPS 2018).

Deviation: of a long question's windows the most similar one counts, as everywhere in this package, not their mean; for
questions of one window both are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..features import TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import gather_rows, highest_precision, top_mask
from .budgets import spend
from .contract import RELEVANCE, RecoveryMethod

_LEAST_RELEVANCE = 1e-6
_NO_VOLUME = 1e-9


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    spending, valid = spend(features, settings), features.valid
    assert features.projected is not None
    assert features.text_similarity is not None
    relevance = _relevance(features.text_similarity, valid)
    text = _largest_volume(features.projected, relevance, valid, spending.counts, spending.most)
    return features.keep(
        saliency=features.saliency(settings.visual_heads),
        visual=spending.whole,
        text=text | top_mask(relevance, spending.counts - text.sum(-1), valid & ~text),
        known_sizes=spending.sizes(),
    )


def _relevance(similarity: Tensor, valid: Tensor) -> Tensor:
    """(B, N), scaled so that the valid patches range from almost 0 to 1."""
    similarity = highest_precision(similarity)
    low = similarity.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = similarity.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    return (similarity - low + _LEAST_RELEVANCE) / (high - low + _LEAST_RELEVANCE)


def _largest_volume(projected: Tensor, relevance: Tensor, valid: Tensor, counts: Tensor, steps: int) -> Tensor:
    """Greedily choose the patches that span the largest volume, `counts` of them or as many as add any: (B, N) bool.

    `factors` are the rows of an incomplete Cholesky factor of the kernel relevance_i cos_ij relevance_j, `volume` is
    the rest of its diagonal.
    """
    scaled = normalize(highest_precision(projected), dim=-1) * relevance.unsqueeze(-1)  # (B, N, D)
    volume = relevance.square().masked_fill(~valid, -torch.inf)  # the cosine of a patch with itself is 1
    factors = torch.zeros_like(volume).unsqueeze(1).repeat(1, steps, 1)  # (B, K, N)
    chosen = torch.zeros_like(valid)
    for step in range(steps):
        pick = volume.argmax(-1, keepdim=True)  # (B, 1)
        largest = volume.gather(-1, pick)
        takes = (largest > _NO_VOLUME) & (step < counts).unsqueeze(-1)
        kernel = (gather_rows(scaled, pick) @ scaled.transpose(1, 2)).squeeze(1)  # (B, N)
        known = factors[:, :step]
        of_pick = known.gather(-1, pick.unsqueeze(1).expand(-1, step, -1))  # (B, step, 1)
        explained = (of_pick.transpose(1, 2) @ known).squeeze(1)
        factor = (kernel - explained) / largest.clamp(min=_NO_VOLUME).sqrt()
        factor = factor.masked_fill(~takes, 0)
        factors[:, step] = factor
        chosen = chosen.scatter(-1, pick, takes | chosen.gather(-1, pick))
        volume = (volume - factor.square()).scatter(-1, pick, torch.where(takes, -torch.inf, largest))
    return chosen & valid


CDPRUNER = RecoveryMethod(
    _select,
    text="required",
    reads_projected=True,
    budget="required",
    defaults={"text_relevance": "penultimate", "text_relevance_sign": -1},
    fields=RELEVANCE,
    source="CDPruner (Zhang et al., arXiv 2506.10967)",
)

__all__ = ["CDPRUNER"]
