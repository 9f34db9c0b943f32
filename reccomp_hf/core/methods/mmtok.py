"""Method `mmtok`: patches that cover both the question's words and the image.

MMTok (Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv
2508.18264), as a re-release of its published code has it. Two tables of softmax over the patches say how well a patch
covers something: a row for every token of the question's words, from the cosines of LLaVA's input embeddings with
projected patches; and a row for every patch, from the cosines of the features that LLaVA's projector reads. Each table
is divided by its number of rows. A row is covered by its largest entry among the chosen patches, and each step takes
the patch that adds most to the coverage of all rows, those of the image weighted by `alpha`. Claimed: with 4 tokens
LLaVA-1.5-7B keeps 87.7 % of its POPE.

Deviation: the words of several questions (`recovery_turns` "all") are read together.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..features import TokenSelection, VisualFeatures
from ..greedy import first_picks, in_blocks, products_of_all, take_row
from ..kernels import in_one_launch
from ..settings import LARGEST, Settings, is_number, shown
from ..tensors import highest_precision
from .budgets import spend
from .contract import RecoveryMethod

_READS = 2
"""Tables of float64 that a step of the greedy choice goes over."""


@dataclasses.dataclass(frozen=True)
class MMTokOptions:
    """Options of `mmtok`.

    Args:
        alpha: Weight of the image's coverage; that of the question is 1.
        text_temperature: Divisor of cosines of words and patches.
        visual_temperature: Divisor of cosines of patches.
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    visual_temperature: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a weight below 0 and a temperature that is not above 0."""
        for name, least in (("alpha", 0.0), ("text_temperature", 1e-4), ("visual_temperature", 1e-4)):
            value = getattr(self, name)
            if not is_number(value) or not least <= value <= LARGEST:
                raise ValueError(f"{name} must be a number from {least:g} to {LARGEST}, got {shown(value)}.")


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    assert features.word_similarity is not None
    spending, words = spend(features, settings), features.word_similarity

    def choose(states: Tensor, words: Tensor, valid: Tensor, counts: Tensor, steps: int) -> Tensor:
        if steps == 0:
            return torch.zeros_like(valid)
        gains = _gains(states, words, valid, settings.options)
        return _most_coverage(gains, valid, counts, steps, 1 + settings.options.alpha)

    arguments = features.hidden_states.detach(), words, features.valid, spending.counts
    row_bytes = _READS * 8 * words.shape[2] * (words.shape[1] + words.shape[2])
    return features.keep(
        saliency=features.saliency(settings.visual_heads),
        visual=spending.whole,
        coverage=in_blocks(choose, arguments, spending.most, row_bytes),
        known_sizes=spending.sizes(),
    )


def _gains(states: Tensor, words: Tensor, valid: Tensor, options: MMTokOptions) -> Tensor:
    """(B, N, M + N) float64: how much a patch alone covers every word, then every patch.

    Args:
        states: (B, N, C), the features that LLaVA's projector reads.
        words: (B, M, N), cosines of words and patches; -inf in the rows of padding.
        valid: (B, N) bool, patches that exist.
        options: Weight and temperatures.
    """
    patch, word = valid.unsqueeze(1), (words > -torch.inf).any(-1, keepdim=True)  # (B, 1, N), (B, M, 1)
    unit = normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
    parts = []
    for cosine, exists, temperature, weight in (
        (words, word, options.text_temperature, 1.0),
        (products_of_all(unit), valid.unsqueeze(-1), options.visual_temperature, options.alpha),
    ):
        logits = (cosine / temperature).masked_fill(~exists, 0).masked_fill(~patch, -torch.inf)
        share = weight * exists / exists.sum(1, keepdim=True).clamp(min=1)  # (B, rows, 1)
        parts.append(highest_precision(logits.softmax(-1)) * share)
    return torch.cat(parts, dim=1).masked_fill(~patch, 0).transpose(1, 2).contiguous()


@in_one_launch("cover_rows")
def _most_coverage(gains: Tensor, valid: Tensor, counts: Tensor, steps: int, most: float) -> Tensor:
    """(B, N) bool: the greedy choice of `counts` patches; the first among equal ones.

    Args:
        gains: (B, N, R), entries of a patch in every row that is to be covered.
        valid: (B, N) bool.
        counts: (B,) int64.
        steps: No entry of `counts` is larger.
        most: No patches cover all rows together better than this.
    """
    covered, larger = torch.zeros_like(gains[:, :1]), torch.empty_like(gains)
    picks: list[Tensor] = []
    taken = ~valid
    for _ in range(steps):
        total = torch.maximum(gains, covered, out=larger).sum(-1)  # (B, N), the coverage with every patch as the next
        picks.append(total.masked_fill(taken, -torch.inf).argmax(-1)[:, None, None])  # (B, 1, 1)
        taken = taken.scatter(1, picks[-1].squeeze(-1), True)
        covered = torch.maximum(covered, take_row(gains, picks[-1]))
    return first_picks(picks, counts, valid)


MMTOK = RecoveryMethod(
    _select,
    text="required",
    reads_projected=True,
    reads_words=True,
    budget="required",
    fields=(),
    source="MMTok (Dong et al., ICLR 2026, arXiv 2508.18264)",
    options=MMTokOptions,
)

__all__ = ["MMTOK"]
