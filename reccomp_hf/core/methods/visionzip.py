"""Method `visionzip`: the class token, the patches it attends to most, the others averaged into evenly spaced targets.

VisionZip (Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467):
dominant tokens by the class token's attention, contextual tokens by the similarity of keys. As in the published code,
the class token is one of the dominant tokens: 64 tokens are the class token, 53 patches in raster order and 10
contextual tokens.

Deviation: the class token has no place in the image; with positions `"original"` a patch takes its place.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn.functional import normalize

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings, shown
from ..tensors import gather_rows, nonzero_first, positions, top_mask
from .budgets import at_places, spend, weighted_sums
from .contract import SALIENCY, RecoveryMethod, check_share


@dataclasses.dataclass(frozen=True)
class VisionZipOptions:
    """Options of `visionzip`.

    Args:
        contextual_share: A number in [0, 1], the share of the tokens that are merged ones, except for one token at
            least; the paper's 10 of 64.
        class_token: Whether one of the tokens is the class token, as in the published code, rather than a patch more.
    """

    contextual_share: float = 10 / 64
    class_token: bool = True

    def __post_init__(self) -> None:
        """Check both."""
        check_share("contextual_share", self.contextual_share)
        if not isinstance(self.class_token, bool):
            raise ValueError(f"class_token must be true or false, got {shown(self.class_token)}.")

    def contextual(self, count: int) -> int:
        """Number of contextual tokens among `count`."""
        return max(0, min(math.floor(self.contextual_share * count), count - 1))


def _class_tokens(count: int, settings: Settings) -> int:
    """Number of class tokens among `count` tokens."""
    return int(count > 0 and settings.options.class_token and settings.position_ids != "original")


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, spending, options = features.saliency(settings.visual_heads), spend(features, settings), settings.options
    contextual = spending.split(options.contextual)
    leading = spending.split(lambda count: _class_tokens(count, settings))
    dominant = top_mask(saliency, spending.counts - contextual - leading, features.valid)
    rest = features.valid & ~dominant & ~spending.whole
    step = (rest.sum(-1) // contextual.clamp(min=1)).clamp(min=1).unsqueeze(-1)
    places = torch.arange(spending.most, device=rest.device) * step  # (B, M)
    return features.keep(
        saliency=saliency,
        visual=dominant | spending.whole,
        centres=at_places(rest, places, contextual),
        merged_counts=contextual + leading,
        known_sizes=spending.sizes(lambda count: options.contextual(count) + _class_tokens(count, settings)),
        leading_counts=leading if _class_tokens(1, settings) else None,
    )


def _merge(features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int) -> MergedTokens:
    """The class token, then the contextual tokens."""
    contextual = _contextual_tokens(features, selection, max_merged)
    if selection.leading_counts is None or max_merged == 0:
        return contextual
    assert features.class_state is not None
    leading = selection.leading_counts.unsqueeze(-1)  # (B, 1), 1 or 0
    source = (positions(contextual.places) - leading).clamp(min=0)  # (B, M)
    is_class = positions(contextual.places) < leading
    tokens = torch.where(
        is_class.unsqueeze(-1), features.class_state.unsqueeze(1), gather_rows(contextual.tokens, source)
    )
    places = contextual.places.gather(1, source).masked_fill(is_class, -1)
    joins = contextual.cluster >= 0
    return MergedTokens(tokens, places, torch.where(joins, contextual.cluster + leading, -1))


def _contextual_tokens(features: VisualFeatures, selection: TokenSelection, most: int) -> MergedTokens:
    """Every other patch joins the target with the most similar key; a token is its target plus their mean."""
    targets = selection.centre_mask
    counts = targets.sum(-1, keepdim=True)
    places = nonzero_first(targets, most)  # (B, M)
    cluster = torch.full_like(targets, -1, dtype=torch.long)
    if most == 0:
        return MergedTokens(features.hidden_states[:, :0], places, cluster)
    with torch.no_grad():
        keys = features.keys[:, 1:].float().unflatten(-1, (features.num_heads, -1)).mean(2)
        keys = normalize(keys, dim=-1)  # (B, N, C / H)
        score = gather_rows(keys, places) @ keys.transpose(1, 2)  # (B, M, N)
        exists = (positions(places) < counts).unsqueeze(-1)  # (B, M, 1)
        nearest = score.masked_fill(~exists, -torch.inf).max(1).indices  # (B, N), the first among equals
        joins = features.valid & ~selection.kept_mask & (counts > 0)
        cluster = torch.where(targets, targets.cumsum(-1) - 1, torch.where(joins, nearest, -1))
        itself = targets.unsqueeze(1) & (positions(targets).unsqueeze(1) == places.unsqueeze(-1))  # (B, M, N)
        joined = (cluster.unsqueeze(1) == positions(places).unsqueeze(-1)) & ~targets.unsqueeze(1)
        weights = joined.float() / joined.sum(-1, keepdim=True).clamp(min=1) + itself.float()
    return MergedTokens(weighted_sums(features.hidden_states, weights), places, cluster)


VISIONZIP = RecoveryMethod(
    _select,
    _merge,
    reads_class_token=True,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    options=VisionZipOptions,
    fields=SALIENCY,
    source="VisionZip (Yang et al., arXiv 2412.04467)",
)

__all__ = ["VISIONZIP"]
