"""Method `divprune`: patches as far from each other as possible, whatever they show.

DivPrune (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv
2503.02175): the max-min diversity problem over cosine distances of LLaVA's projected features, solved greedily.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..features import TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import gather_rows, highest_precision
from .budgets import spend
from .contract import RecoveryMethod


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    spending = spend(features, settings)
    assert features.projected is not None
    return features.keep(
        saliency=features.saliency(settings.visual_heads),
        visual=spending.whole,
        coverage=_diverse_patches(features.projected, features.valid, spending.counts, spending.most),
        known_sizes=spending.sizes(),
    )


def _diverse_patches(projected: Tensor, valid: Tensor, counts: Tensor, steps: int) -> Tensor:
    """(B, N) bool: the patch farthest from its nearest neighbour, then each time the one farthest from all chosen."""
    chosen = torch.zeros_like(valid)
    if steps == 0:
        return chosen
    unit = normalize(highest_precision(projected), dim=-1)
    cosine = unit @ unit.transpose(1, 2)  # (B, N, N), alike both ways but for rounding
    distance = (cosine + cosine.transpose(1, 2)).div_(-2).add_(1)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    distance.masked_fill_(~valid.unsqueeze(1), torch.inf)
    pick = distance.amin(-1).masked_fill(~valid, -torch.inf).argmax(-1, keepdim=True)  # (B, 1)
    gap = torch.zeros_like(distance[:, 0]).masked_fill(valid, torch.inf).masked_fill(~valid, -torch.inf)
    for step in range(steps):
        chosen = chosen.scatter(-1, pick, (step < counts).unsqueeze(-1) | chosen.gather(-1, pick))
        gap = torch.minimum(gap, gather_rows(distance, pick).squeeze(1)).scatter(-1, pick, -torch.inf)
        pick = gap.argmax(-1, keepdim=True)
    return chosen & valid


DIVPRUNE = RecoveryMethod(
    _select,
    budget="required",
    reads_projected=True,
    fields=(),
    source="DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175)",
)

__all__ = ["DIVPRUNE"]
