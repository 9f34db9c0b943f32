"""Method `holov`: every part of the image keeps patches, more of them where the class token attends.

HoloV (Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
NeurIPS 2025, arXiv 2510.02912). The patches in raster order are cut into 16 crops of equal length, the first ones
longer by one if they do not divide. A crop gets the budget times its share of all crops' scores, rounded down; what is
left goes one by one to the crops with the largest scores. It keeps its patches with the most class attention of the
next-to-last block. Claimed: 95.8 % of LLaVA-1.5's performance without 88.9 % of the tokens.

The published score of a crop is the mean over its patches of 1000 a + 0.09 v A / (V + 1e-6), where a is attention, v
the variance of a patch's similarities in the crop, and A and V are the crop's means of 1000 a and of v. So it is
1000 times the mean attention times 1 + 0.09 V / (V + 1e-6). The published code gives a crop of one patch its attention
without the factor 1000.

Deviation: V / (V + 1e-6) is taken as 1, which leaves the similarities out; where V is above 0.01 a share changes by
less than 0.001 %.
Deviation: tokens that crops have no patches for go to the most attended patches left; the published code adds zeros.
Deviation: tokens stand in raster order, not in falling attention inside a crop.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..features import TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import highest_precision, positions, top_mask
from .budgets import spend
from .contract import SALIENCY, RecoveryMethod, check_int

_SCALE = 1e3 * (1 + 0.09)
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class HoloVOptions:
    """Options of `holov`.

    Args:
        crops: An int >= 1, the number of crops of an image.
    """

    crops: int = 16

    def __post_init__(self) -> None:
        """Check the number."""
        check_int("crops", self.crops, 1)


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, spending, valid = features.saliency(settings.visual_heads), spend(features, settings), features.valid
    crops = min(settings.options.crops, valid.shape[1])
    crop, sizes = _crops(valid, crops)
    tokens = _shares(saliency, crop, sizes, spending.counts)
    kept = valid & (_rank_in_crop(saliency, crop) < tokens.gather(-1, crop))
    kept = kept | top_mask(saliency, spending.counts - kept.sum(-1), valid & ~kept)
    return features.keep(saliency=saliency, visual=kept | spending.whole, known_sizes=spending.sizes())


def _crops(valid: Tensor, crops: int) -> tuple[Tensor, Tensor]:
    """The crop of every patch, (B, N) int64, any for one that is not valid; and the crops' sizes, (B, P) int64."""
    order = valid.cumsum(-1)  # 1 for the first patch
    count, numbers = order[:, -1:], torch.arange(1, crops + 1, device=valid.device)
    short, longer = count // crops, count % crops
    ends = numbers * short + torch.minimum(numbers, longer)  # (B, P), patches of a crop and those before it
    return torch.searchsorted(ends, order), short + (numbers <= longer)


def _shares(saliency: Tensor, crop: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """(B, P) int64, tokens of every crop; `counts` together, or fewer where crops have fewer patches."""
    elsewhere = crop.unsqueeze(1) != torch.arange(sizes.shape[1], device=crop.device).unsqueeze(-1)  # (B, P, N)
    attention = highest_precision(saliency).unsqueeze(1).masked_fill(elsewhere, 0).sum(-1)  # 0 where not valid
    score = attention / sizes.clamp(min=1)
    score = torch.where(sizes > 1, score * _SCALE, score)
    share = score / (score.sum(-1, keepdim=True) + _ROUNDING)
    tokens = (share * counts.unsqueeze(-1)).floor().long()
    return tokens + top_mask(share, counts - tokens.sum(-1), sizes > 0)


def _rank_in_crop(saliency: Tensor, crop: Tensor) -> Tensor:
    """(B, N) int64, number of patches of its crop that come before a patch by saliency."""
    by_saliency = saliency.argsort(dim=-1, descending=True, stable=True)
    order = by_saliency.gather(-1, crop.gather(-1, by_saliency).argsort(dim=-1, stable=True))
    ordered = crop.gather(-1, order)
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(crop).scatter_(-1, order, positions(crop) - first)


HOLOV = RecoveryMethod(
    _select,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    options=HoloVOptions,
    fields=SALIENCY,
    source="HoloV (Zou et al., NeurIPS 2025, arXiv 2510.02912)",
)

__all__ = ["HOLOV"]
