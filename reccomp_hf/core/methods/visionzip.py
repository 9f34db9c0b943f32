"""Method `visionzip`: the patches with the most class attention, the others averaged into evenly spaced targets.

VisionZip (Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467):
dominant tokens by the class token's attention, contextual tokens by the similarity of keys.

Deviation: all dominant tokens are patches; the published code counts the class token, which it keeps, among them.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn.functional import normalize

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import gather_rows, nonzero_first, positions, top_mask
from .budgets import at_places, spend, weighted_sums
from .contract import SALIENCY, RecoveryMethod, check_share


@dataclasses.dataclass(frozen=True)
class VisionZipOptions:
    """Options of `visionzip`.

    Args:
        contextual_share: A number in [0, 1], the share of the tokens that are merged ones, except for one token at
            least; the paper's 10 of 64.
    """

    contextual_share: float = 10 / 64

    def __post_init__(self) -> None:
        """Check the share."""
        check_share("contextual_share", self.contextual_share)

    def contextual(self, count: int) -> int:
        """Number of merged tokens among `count`."""
        return max(0, min(math.floor(self.contextual_share * count), count - 1))


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, spending = features.saliency(settings.visual_heads), spend(features, settings)
    contextual = spending.split(settings.options.contextual)
    dominant = top_mask(saliency, spending.counts - contextual, features.valid)
    rest = features.valid & ~dominant & ~spending.whole
    step = (rest.sum(-1) // contextual.clamp(min=1)).clamp(min=1).unsqueeze(-1)
    places = torch.arange(spending.most, device=rest.device) * step  # (B, M)
    return features.keep(
        saliency=saliency,
        visual=dominant | spending.whole,
        centres=at_places(rest, places, contextual),
        merged_counts=contextual,
        known_sizes=spending.sizes(settings.options.contextual),
    )


def _merge(features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int) -> MergedTokens:
    """Every other patch joins the target with the most similar key; a token is its target plus their mean."""
    targets = selection.centre_mask
    places = nonzero_first(targets, max_merged)  # (B, M)
    cluster = torch.full_like(targets, -1, dtype=torch.long)
    if max_merged == 0:
        return MergedTokens(features.hidden_states[:, :0], places, cluster)
    with torch.no_grad():
        keys = features.keys[:, 1:].float().unflatten(-1, (features.num_heads, -1)).mean(2)
        keys = normalize(keys, dim=-1)  # (B, N, C / H)
        score = gather_rows(keys, places) @ keys.transpose(1, 2)  # (B, M, N)
        exists = (positions(places) < selection.merged_counts.unsqueeze(-1)).unsqueeze(-1)  # (B, M, 1)
        nearest = score.masked_fill(~exists, -torch.inf).max(1).indices  # (B, N), the first among equals
        joins = features.valid & ~selection.kept_mask & (selection.merged_counts > 0).unsqueeze(-1)
        cluster = torch.where(targets, targets.cumsum(-1) - 1, torch.where(joins, nearest, -1))
        itself = targets.unsqueeze(1) & (positions(targets).unsqueeze(1) == places.unsqueeze(-1))  # (B, M, N)
        joined = (cluster.unsqueeze(1) == positions(places).unsqueeze(-1)) & ~targets.unsqueeze(1)
        weights = joined / joined.sum(-1, keepdim=True).clamp(min=1) + itself.float()
    return MergedTokens(weighted_sums(features.hidden_states, weights), places, cluster)


VISIONZIP = RecoveryMethod(
    _select,
    _merge,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    options=VisionZipOptions,
    fields=SALIENCY,
    source="VisionZip (Yang et al., arXiv 2412.04467)",
)

__all__ = ["VISIONZIP"]
