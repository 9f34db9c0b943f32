"""Method `vispruner`: the patches with the most class attention, and those of the others that are least alike.

VisPruner (Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
ICCV 2025, arXiv 2412.01818): important tokens by the class token's attention, diverse ones by dropping near
duplicates.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..features import TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import highest_precision, top_mask
from .budgets import spend
from .contract import SALIENCY, RecoveryMethod, check_int, check_share


@dataclasses.dataclass(frozen=True)
class VisPrunerOptions:
    """Options of `vispruner`.

    Args:
        important_share: A number in [0, 1], the share of the tokens that attention chooses; at least one token is left
            for the others.
        step: An int >= 1, near duplicates that are dropped at a time.
    """

    important_share: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        """Check both."""
        check_share("important_share", self.important_share)
        check_int("step", self.step, 1)

    def important(self, count: int) -> int:
        """Number of tokens that attention chooses among `count`."""
        return max(0, min(math.floor(self.important_share * count), count - 1))

    def rounds(self, alive: int, wanted: int) -> int:
        """Number of times that near duplicates are dropped until `wanted` of `alive` patches are left."""
        rounds = 0
        while alive > wanted:
            alive -= min(self.step, alive - wanted, (alive + 1) // 2)
            rounds += 1
        return rounds


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, spending, options = features.saliency(settings.visual_heads), spend(features, settings), settings.options
    important = spending.split(options.important)
    visual = top_mask(saliency, important, features.valid)
    wanted, patches = spending.counts - important, features.valid.shape[1]
    alive = features.valid & ~visual & (wanted > 0).unsqueeze(-1)
    if spending.known is None:  # only the device knows how many are alive; an extra round drops nothing
        rounds = max(options.rounds(count, 1) for count in range(1, patches + 1))
    else:
        chosen = options.important(spending.most)
        rounds = options.rounds(patches - chosen, spending.most - chosen) if spending.most else 0
    return features.keep(
        saliency=saliency,
        visual=visual | spending.whole,
        coverage=_least_alike(features.hidden_states, alive, wanted, options.step, rounds),
        known_sizes=spending.sizes(),
    )


def _least_alike(states: Tensor, alive: Tensor, wanted: Tensor, step: int, rounds: int) -> Tensor:
    """Drop, a few at a time, the patches at even places that most resemble one at an odd place.

    Deviation: the published code appends the survivors of the even places before the odd ones and so shuffles later
    rounds; here they stay in raster order, so that neighbours are always compared. Other near duplicates may survive.
    """
    unit = normalize(highest_precision(states.detach()), dim=-1)
    likeness = unit @ unit.transpose(1, 2) if rounds else states.new_zeros(0)  # (B, N, N)
    for _ in range(rounds):
        is_even = (alive.cumsum(-1) - 1) % 2 == 0
        even, odd = alive & is_even, alive & ~is_even
        score = likeness.masked_fill(~odd.unsqueeze(1), -torch.inf).amax(-1)  # (B, N)
        surplus = torch.minimum(alive.sum(-1) - wanted, even.sum(-1)).clamp(max=step)
        alive = alive & ~top_mask(score, surplus, even)
    return alive


VISPRUNER = RecoveryMethod(
    _select,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    options=VisPrunerOptions,
    fields=SALIENCY,
    source="VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818)",
)

__all__ = ["VISPRUNER"]
