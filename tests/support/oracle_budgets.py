"""Budgets in plain arithmetic: of an image, and of the tiles of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def image_budget(budget: float, patches: int) -> int:
    """Tokens of an image, by its number of valid patches."""
    if isinstance(budget, int):
        return min(budget, patches)
    return min(patches, max(1, math.floor(budget * patches + 0.5)))


def tile_budgets(budget: float, patches: Sequence[int]) -> list[int]:
    """Tokens of each of an image's tiles, in proportion to their valid patches, by largest remainder."""
    total, everything = image_budget(budget, sum(patches)), sum(patches)
    shares = [Fraction(total * count, everything) if everything else Fraction(0) for count in patches]
    given = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(patches)), key=lambda t: (given[t] - shares[t], t))
    for t in by_remainder[: total - sum(given)]:
        given[t] += 1
    return given


# ---- choices by saliency -------------------------------------------------------------------------------------------
