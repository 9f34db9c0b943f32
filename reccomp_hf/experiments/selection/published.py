"""The greedy loops of published methods in straightforward code, next to which `recover_tokens` is timed.

They follow the steps of the methods' published code or paper, an image at a time and in float32: all cosines, then one
pick after the other, or one round of dropping patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.features import VisualFeatures

PublishedLoop = Callable[[VisualFeatures, int], Tensor]
"""Features of one image, budget -> (K,) int64, patches in raster order."""


def divprune_loop(features: VisualFeatures, budget: int) -> Tensor:
    """DivPrune: each time the patch whose nearest chosen one is farthest, of all distances to the chosen ones."""
    unit = _units(features.projected)
    distance = 1 - unit @ unit.T
    chosen = torch.empty(budget, dtype=torch.long)
    for step in range(budget):
        # At first every patch is chosen, and each is its own nearest.
        from_chosen = distance.topk(2, dim=0, largest=False).values[1:] if step == 0 else distance[chosen[:step]]
        chosen[step] = from_chosen.amin(0).argmax()
    return chosen.sort().values


def cdpruner_loop(features: VisualFeatures, budget: int) -> Tensor:
    """CDPruner: fast greedy inference over the kernel of cosines, weighted by the question's relevance."""
    unit, similarity = _units(features.projected), features.text_similarity
    assert similarity is not None
    similarity = similarity[0]
    low, high = similarity.amin(), similarity.amax()
    relevance = (similarity - low + 1e-6) / (high - low)
    kernel = relevance.unsqueeze(1) * (unit @ unit.T) * relevance
    volume = kernel.diagonal().clone()
    factors = torch.zeros(budget, len(volume))
    chosen = torch.empty(budget, dtype=torch.long)
    for step in range(budget):
        pick = chosen[step] = volume.argmax()
        factor = (kernel[pick] - factors[:step, pick] @ factors[:step]) / volume[pick].sqrt()
        factors[step] = factor
        volume -= factor.square()
        volume[pick] = -torch.inf
    return chosen.sort().values


def scope_loop(features: VisualFeatures, budget: int) -> Tensor:
    """SCOPE: each time the patch with the largest product of class attention and what it adds to the coverage."""
    unit, attention = _units(features.hidden_states), features.saliency("mean")[0]
    cosine, covered, chosen = unit @ unit.T, torch.zeros(len(unit)), torch.zeros(len(unit), dtype=torch.bool)
    for _ in range(budget):
        gain = (cosine - covered).clamp(min=0).sum(-1) * attention
        pick = gain.masked_fill(chosen, -torch.inf).argmax()
        chosen[pick] = True
        covered = torch.maximum(covered, cosine[pick])
    return chosen.nonzero().flatten()


def vispruner_loop(features: VisualFeatures, budget: int) -> Tensor:
    """VisPruner: half by class attention; of the rest, eight patches a round are dropped that resemble an odd one."""
    unit, important = _units(features.hidden_states), budget // 2
    cosine = unit @ unit.T
    order = features.saliency("mean")[0].argsort(descending=True)
    left = order[important:]
    while len(left) > budget - important:
        even, odd = left[::2], left[1::2]
        likeness = cosine[even][:, odd].amax(-1)
        surplus = min(8, len(left) - (budget - important))
        left = torch.cat([even[likeness.argsort(descending=True)[surplus:]], odd])
    return torch.cat([order[:important], left]).sort().values


def _units(states: Tensor | None) -> Tensor:
    """(N, C) of length 1, of states (1, N, C)."""
    assert states is not None
    return states[0] / states[0].norm(dim=-1, keepdim=True)


PUBLISHED_LOOPS: dict[str, PublishedLoop] = {
    "vispruner": vispruner_loop,
    "divprune": divprune_loop,
    "cdpruner": cdpruner_loop,
    "scope": scope_loop,
}
"""Method -> its loop."""

__all__ = ["PUBLISHED_LOOPS", "PublishedLoop", "cdpruner_loop", "divprune_loop", "scope_loop", "vispruner_loop"]
