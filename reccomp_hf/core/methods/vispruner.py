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
from ..greedy import products_of_all
from ..kernels import in_one_launch
from ..settings import Settings
from ..tensors import positions, top_mask
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

    def widths(self, alive: int, wanted: int) -> list[int]:
        """Number of patches left before each round of dropping near duplicates, until `wanted` of `alive` are left."""
        widths = []
        while alive > wanted:
            widths.append(alive)
            alive -= min(self.step, alive - wanted, (alive + 1) // 2)
        return widths


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, spending, options = features.saliency(settings.visual_heads), spend(features, settings), settings.options
    important = spending.split(options.important)
    visual = top_mask(saliency, important, features.valid)
    wanted, patches = spending.counts - important, features.valid.shape[1]
    alive = features.valid & ~visual & (wanted > 0).unsqueeze(-1)
    if spending.known is None:  # only the device knows how many are alive; an extra round drops nothing
        widths = [patches] * max(len(options.widths(count, 1)) for count in range(1, patches + 1))
    else:
        chosen = options.important(spending.most)
        widths = options.widths(patches - chosen, spending.most - chosen) if spending.most else []
    return features.keep(
        saliency=saliency,
        visual=visual | spending.whole,
        coverage=_least_alike(features.hidden_states, saliency, alive, wanted, options.step, widths),
        known_sizes=spending.sizes(),
    )


def _least_alike(
    states: Tensor, saliency: Tensor, alive: Tensor, wanted: Tensor, step: int, widths: list[int]
) -> Tensor:
    """Drop, a few at a time, the patches at even places of a queue that most resemble one at an odd place.

    The queue starts in falling attention; after a round the even places that are left come first, in falling likeness,
    and then the odd ones.
    """
    if not widths:
        return alive
    unit = normalize(states.detach().float(), dim=-1)
    queue = saliency.masked_fill(~alive, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return _drop(products_of_all(unit), queue, alive.sum(-1), wanted, step, widths)


@in_one_launch("drop_alike")
def _drop(likeness: Tensor, queue: Tensor, left: Tensor, wanted: Tensor, step: int, widths: list[int]) -> Tensor:
    """The patches (B, N) of the first `left` (B,) of a queue (B, N) that are left when `wanted` (B,) are."""
    beyond = queue.shape[1]
    nothing = torch.zeros_like(queue, dtype=torch.bool)[:, :1].expand(-1, beyond + 1)
    likeness, left = likeness.flatten(1), left.unsqueeze(-1)  # (B, N * N), (B, 1)
    for width in widths:
        queue = queue[:, :width]
        exists = positions(queue) < left
        even, odd = queue[:, ::2], queue[:, 1::2]
        score = likeness.new_full(queue.shape, -2.0)  # below any cosine: a stable sort leaves the odd places in order
        if width > 1:
            pairs = (even.unsqueeze(-1) * beyond + odd.unsqueeze(1)).flatten(1)
            values = likeness.gather(1, pairs).view(*even.shape, -1)
            score[:, ::2] = values.masked_fill_(~exists[:, 1::2].unsqueeze(1), -1.5).amax(-1)
        order = score.masked_fill(~exists, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        surplus = torch.minimum((left - wanted.unsqueeze(-1)).clamp(max=step), (left + 1) // 2).clamp(min=0)
        queue = queue.gather(-1, order.gather(-1, (positions(queue) + surplus).clamp(max=width - 1)))
        left = left - surplus
    places = torch.where(positions(queue) < left, queue, beyond)
    return nothing.scatter(-1, places, True)[:, :beyond]


VISPRUNER = RecoveryMethod(
    _select,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    options=VisPrunerOptions,
    fields=SALIENCY,
    source="VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818)",
)

__all__ = ["VISPRUNER"]
