"""The greedy loops of published methods in straightforward code, next to which `recover_tokens` is timed.

`divprune_loop` and `cdpruner_loop` follow the steps of the methods' published code, an image at a time: all cosines in
float32, then one pick after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PublishedLoop = Callable[[Tensor, Tensor, int], Tensor]
"""projected (N, D), text similarity (N,), budget -> (K,) int64, patches in raster order."""


def divprune_loop(projected: Tensor, similarity: Tensor, budget: int) -> Tensor:
    """DivPrune: each time the patch whose nearest chosen one is farthest, of all distances to the chosen ones."""
    unit = projected / projected.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen = torch.empty(budget, dtype=torch.long)
    for step in range(budget):
        # At first every patch is chosen, and each is its own nearest.
        from_chosen = distance.topk(2, dim=0, largest=False).values[1:] if step == 0 else distance[chosen[:step]]
        chosen[step] = from_chosen.amin(0).argmax()
    return chosen.sort().values


def cdpruner_loop(projected: Tensor, similarity: Tensor, budget: int) -> Tensor:
    """CDPruner: fast greedy inference over the kernel of cosines, weighted by the question's relevance."""
    unit = projected / projected.norm(dim=-1, keepdim=True)
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


PUBLISHED_LOOPS: dict[str, PublishedLoop] = {"divprune": divprune_loop, "cdpruner": cdpruner_loop}
"""Method -> its loop."""

__all__ = ["PUBLISHED_LOOPS", "PublishedLoop", "cdpruner_loop", "divprune_loop"]
