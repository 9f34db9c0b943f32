"""Method `authors`: the computation of the paper's released code, kept apart for reproduction.

Written from a description of what that code computes (github.com/banjiuyufen/Recoverable-Compression), including what
looks like slips in it, each named at its line. No other method uses anything here.

The text is padded to the length of the text encoder and embedded by its last place, which holds padding.

Deviation: the text is the question, in windows if it is long; the released code reads the first line of the prompt,
which in LLaVA-1.5's prompts ends before the question, up to the length of the text encoder.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..outliers import local_outlier_factor
from ..settings import Settings, shown
from ..tensors import nonzero_first, top_mask
from .contract import RecoveryMethod

NEIGHBORS_MERGED = 32
TEXT_WEIGHT = 50
POOLINGS = ("last", "end")


@dataclasses.dataclass(frozen=True)
class AuthorsOptions:
    """Options of `authors`.

    Args:
        pooling: Where the text is pooled: `"last"`, at the last place, as in the released code; or `"end"`, at the
            end-of-text token, as CLIP was trained.
    """

    pooling: str = "last"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be 'last' or 'end', got {shown(self.pooling)}.")


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency = features.saliency("joint")
    valid, size = features.valid, features.valid.sum(-1)
    visual_share = _outlier_share(saliency, settings.outlier_neighbors, settings, valid)
    visual = top_mask(saliency, _floor(size * visual_share), valid)
    similarity = _without_chosen(features, visual)
    text_share = _outlier_share(similarity, settings.outlier_neighbors, settings, valid)
    # Ranked among all patches: the chosen ones hold the lowest score, so they are not chosen again.
    text = top_mask(similarity, _floor((size - visual.sum(-1)) * text_share), valid) & ~visual
    rest = valid & ~visual & ~text
    merge_share = _outlier_share(saliency, settings.merge_neighbors, settings, rest)
    # The released code multiplies by the channel width, not by a number of tokens: far more centres than intended.
    n_centres = torch.minimum(_floor(features.keys.shape[-1] * merge_share), rest.sum(-1))
    centres = top_mask(saliency, n_centres, rest)
    merged_counts = n_centres + (n_centres > 0)  # the extra token exists only with centres
    return features.keep(visual=visual, text=text, centres=centres, merged_counts=merged_counts, saliency=saliency)


def _merge(features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int) -> MergedTokens:
    dropped = torch.full_like(features.valid, -1, dtype=torch.long)  # a patch can enter several tokens here
    centre_slots = max(max_merged - 1, 0)
    rest = features.valid & ~selection.kept_mask
    scores = selection.saliency.masked_fill(~selection.centre_mask, -torch.inf)
    centres = scores.argsort(dim=-1, descending=True, stable=True)[:, :centre_slots]  # (B, M), descending saliency
    if max_merged == 0:
        return MergedTokens(features.hidden_states[:, :0], centres, dropped)
    with torch.no_grad():
        weights = _neighbor_weights(features, selection, rest, centres)  # (B, M, N)
        others = (rest & ~selection.centre_mask) * selection.saliency  # (B, N)
        weights = torch.cat([weights, others.unsqueeze(1)], dim=1)  # (B, M + 1, N)
        # The extra token follows the row's own last centre.
        n_centres = (selection.merged_counts - 1).clamp(min=0).unsqueeze(-1)
        slot = torch.arange(max_merged, device=rest.device).expand(rest.shape[0], -1)
        source = torch.where(slot < n_centres, slot, centre_slots)
        weights = weights.gather(1, source.unsqueeze(-1).expand(-1, -1, weights.shape[-1]))
    states = features.hidden_states
    precise = torch.promote_types(states.dtype, torch.float32)
    places = torch.nn.functional.pad(centres, (0, 1), value=-1).gather(1, source)
    return MergedTokens((weights.to(precise) @ states.to(precise)).to(states.dtype), places, dropped)


def _neighbor_weights(features: VisualFeatures, selection: TokenSelection, rest: Tensor, centres: Tensor) -> Tensor:
    """(B, M, N): for each centre's token 1 on the centre and the raw saliency on its nearest remaining patches."""
    patches = rest.shape[1]
    rest_index = nonzero_first(rest, patches)  # (B, N): rest position -> patch
    position = rest.cumsum(-1) - 1  # (B, N): patch -> rest position
    exists = torch.arange(patches, device=rest.device) < rest.sum(-1, keepdim=True)
    # Index slip of the released code: the key of rest position i is read from patch i of the full grid.
    keys = normalize(features.keys[:, 1:].float(), dim=-1)
    centre_position = position.gather(1, centres)  # (B, M)
    centre_keys = keys.gather(1, centre_position.clamp(min=0).unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
    score = centre_keys @ keys.transpose(1, 2)  # (B, M, N), columns are rest positions
    if features.text_similarity is not None:
        score = score + TEXT_WEIGHT * features.text_similarity.gather(1, rest_index).unsqueeze(1)
    itself = torch.arange(patches, device=rest.device) == centre_position.unsqueeze(-1)
    candidates = (exists.unsqueeze(1) & ~itself).flatten(0, 1)
    wanted = torch.full_like(candidates[:, 0], NEIGHBORS_MERGED, dtype=torch.long)
    near = top_mask(score.flatten(0, 1), wanted, candidates).view_as(score)
    weights = near * selection.saliency.gather(1, rest_index).unsqueeze(1) + itself
    return torch.zeros_like(weights).scatter_(2, rest_index.unsqueeze(1).expand_as(weights), weights)


def _outlier_share(values: Tensor, k: int, settings: Settings, valid: Tensor) -> Tensor:
    """Share of outliers of both tails among a row's valid values; 0 for an empty row. (B, N) -> (B,)."""
    factor = local_outlier_factor(values, k, valid)
    count = ((factor > settings.outlier_threshold) & valid).sum(-1)
    return count.to(factor.dtype) / valid.sum(-1).clamp(min=1)


def _without_chosen(features: VisualFeatures, chosen: Tensor) -> Tensor:
    """The similarity with the chosen patches at the row's lowest value."""
    similarity = features.text_similarity
    if similarity is None:
        raise ValueError("Method 'authors' needs a question: text_similarity is None.")
    lowest = similarity.masked_fill(~features.valid, torch.inf).amin(-1, keepdim=True)
    return torch.where(chosen, lowest, similarity)


def _floor(values: Tensor) -> Tensor:
    return values.floor().long()


AUTHORS = RecoveryMethod(
    _select,
    _merge,
    text="required",
    scales_similarity=True,
    budget="none",
    shares_patches=True,
    compact_only=True,  # its extra token has no place
    options=AuthorsOptions,
    source="Recoverable Compression as its authors' code computes it (Chen et al., AAAI 2025, arXiv 2409.01179)",
)

__all__ = ["AUTHORS"]
