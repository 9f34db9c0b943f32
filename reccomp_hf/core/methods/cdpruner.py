"""Method `cdpruner`: patches that are relevant to the question and unlike each other.

CDPruner (Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
arXiv 2506.10967): a determinantal point process over LLaVA's projected features, conditioned on CLIP's relevance; its
most likely set is found greedily (Chen, Zhang & Zhou, "Fast Greedy MAP Inference for Determinantal Point Process",
NeurIPS 2018).

Deviation: of a long question's windows the most similar one counts, as everywhere in this package, not their mean; for
questions of one window both are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..features import TokenSelection, VisualFeatures
from ..greedy import (
    NO_LENGTH,
    chosen_alone,
    first_picks,
    in_blocks,
    lengths_alone,
    products_alone,
    products_of_all,
    products_one_by_one,
    take_row,
)
from ..kernels import in_one_launch
from ..settings import Settings
from ..tensors import highest_precision, precise_features, top_mask
from .budgets import spend
from .contract import RELEVANCE, RecoveryMethod

_LEAST_RELEVANCE = 1e-6
_NO_VOLUME = 1e-9


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    spending, valid = spend(features, settings), features.valid
    assert features.projected is not None
    assert features.text_similarity is not None
    relevance = scaled_relevance(features.text_similarity, valid)
    text = largest_volume(features.projected, relevance, valid, spending.counts, spending.most)
    return features.keep(
        saliency=features.saliency(settings.visual_heads),
        visual=spending.whole,
        text=text | top_mask(relevance, spending.counts - text.sum(-1), valid & ~text),
        known_sizes=spending.sizes(),
    )


def scaled_relevance(similarity: Tensor, valid: Tensor) -> Tensor:
    """(B, N), scaled so that the valid patches range from almost 0 to 1."""
    similarity = highest_precision(similarity)
    low = similarity.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = similarity.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    return (similarity - low + _LEAST_RELEVANCE) / (high - low + _LEAST_RELEVANCE)


def largest_volume(features: Tensor, relevance: Tensor, valid: Tensor, counts: Tensor, steps: int) -> Tensor:
    """Greedily choose the patches that span the largest volume, `counts` of them or as many as add any: (B, N) bool.

    Cosines are taken in float32, or in float64 where the features have so few dimensions that volumes may vanish; the
    rest is in float64.

    Args:
        features: (B, N, D), any floating dtype.
        relevance: (B, N) from `scaled_relevance`.
        valid: (B, N) bool, patches to choose from.
        counts: (B,) int64, how many to choose.
        steps: No entry of `counts` is larger.
    """
    return in_blocks(_widen, (features, relevance, valid, counts), steps, alone=_widen_alone)


def _widen(features: Tensor, relevance: Tensor, valid: Tensor, counts: Tensor, steps: int) -> Tensor:
    """`largest_volume` of some rows."""
    if not steps:
        return torch.zeros_like(valid)
    precise, weight = precise_features(features), relevance.masked_fill(~valid, 0).unsqueeze(1)  # (B, N, D), (B, 1, N)
    patches = precise.transpose(1, 2)  # (B, D, N)
    scale = weight / torch.linalg.vector_norm(precise, dim=-1).clamp(min=NO_LENGTH).unsqueeze(1)  # (B, 1, N)
    volume = weight.square()
    if products_one_by_one(precise, steps):

        def kernel(pick: Tensor) -> Tensor:
            row = (take_row(precise, pick) @ patches) * (scale * scale.gather(-1, pick))
            return row.scatter_(-1, pick, weight.gather(-1, pick).square())

        return _add_volume(kernel, volume, valid, counts, steps, _NO_VOLUME)
    table = products_of_all(precise).to(weight.dtype).mul_(scale).mul_(scale.transpose(1, 2))  # (B, N, N)
    table.diagonal(dim1=1, dim2=2).copy_(volume.squeeze(1))
    return _widen_by_table(table, volume, valid, counts, steps, _NO_VOLUME)


def _widen_alone(features: Tensor, relevance: Tensor, valid: Tensor, counts: Tensor, steps: int) -> Tensor:
    """`_widen` of one image by numpy."""
    patches, weight = precise_features(features)[0].numpy(), np.where(valid[0].numpy(), relevance[0].numpy(), 0)
    scale, volume = weight / np.maximum(lengths_alone(patches), NO_LENGTH), weight * weight
    factors, picks = np.zeros((len(volume), steps)), []
    for step in range(steps):
        pick = int(volume.argmax())
        if not volume[pick] > _NO_VOLUME:
            break
        picks.append(pick)
        row = products_alone(patches, patches[pick]) * (scale * scale[pick])
        row[pick] = weight[pick] ** 2
        row -= products_alone(factors[:, :step], factors[pick, :step])
        row /= np.sqrt(volume[pick])
        factors[:, step] = row
        volume -= row * row
    return chosen_alone(picks, valid)


@in_one_launch("widen")
def _widen_by_table(table: Tensor, volume: Tensor, valid: Tensor, counts: Tensor, steps: int, least: float) -> Tensor:
    return _add_volume(functools.partial(take_row, table), volume, valid, counts, steps, least)


def _add_volume(
    kernel: Callable[[Tensor], Tensor], volume: Tensor, valid: Tensor, counts: Tensor, steps: int, least: float
) -> Tensor:
    """Choose the patch that adds the most volume, again and again, as long as any adds more than `least`.

    `factors` are the rows of an incomplete Cholesky factor of the kernel relevance_i cos_ij relevance_j, of which
    `kernel` gives the rows of picks; `volume` (B, 1, N) is the rest of its diagonal: 0 for a patch that was chosen,
    since its cosine with itself counts as 1.
    """
    factors = volume.new_zeros(steps, *volume.shape)  # (K, B, 1, N)
    picks, volumes = [], []
    for step in range(steps):
        largest, pick = volume.max(-1, keepdim=True)  # (B, 1, 1)
        picks.append(pick)
        volumes.append(largest)
        known = factors[:step]
        of_pick = known.gather(-1, pick.expand(step, -1, -1, -1)).squeeze(-1).permute(1, 2, 0)  # (B, 1, step)
        rest = torch.baddbmm(kernel(pick), of_pick, known.squeeze(2).transpose(0, 1), alpha=-1)  # (B, 1, N)
        factor = torch.mul(rest, largest.rsqrt(), out=factors[step])
        volume = torch.addcmul(volume, factor, factor, value=-1)
    adds_volume = (torch.cat(volumes, -1).squeeze(1) > least).cumprod(-1)  # (B, K)
    return first_picks(picks, torch.minimum(counts, adds_volume.sum(-1)), valid)


CDPRUNER = RecoveryMethod(
    _select,
    text="required",
    reads_projected=True,
    budget="required",
    defaults={"text_relevance": "penultimate", "text_relevance_sign": -1},
    fields=RELEVANCE,
    source="CDPruner (Zhang et al., arXiv 2506.10967)",
)

__all__ = ["CDPRUNER", "largest_volume", "scaled_relevance"]
