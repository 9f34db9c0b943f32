"""A tile as a method's plain loop reads it, and the choice that the loop returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from oracle import top

Array = np.ndarray


@dataclasses.dataclass
class Tile:
    """The inputs of a method for one tile; `patches` are the raster indices of the valid ones."""

    h: Array  # (N, C)
    keys: Array  # (N, C), without the class token
    a: Array  # (N,)
    s: Array | None  # (N,)
    p: Array | None  # (N, D)
    received: Array | None  # (2, N)
    columns: int
    patches: list[int]
    num_heads: int
    options: dict[str, Any]
    compact: bool = True  # PruMerge's tokens come in falling attention, not in raster order; VisionZip's class token
    class_state: Array | None = None  # (C,)
    words: Array | None = None  # (M, N), -inf in the rows of padding
    gaps: list[float] = dataclasses.field(default_factory=list)

    def note(self, left: float, right: float, scale: float = 1.0) -> None:
        """Remember how near to each other two numbers are whose order decides something."""
        if left != right:
            self.gaps.append(abs(left - right) / scale)

    def top_noted(self, indices: Sequence[int], scores: Any, count: int) -> list[int]:
        """`top` for scores that were computed here, so that rounding may order them otherwise."""
        order = top(indices, scores, len(indices))
        if 0 < count < len(order):
            self.note(float(scores[order[count - 1]]), float(scores[order[count]]))
        return order[:count]


@dataclasses.dataclass
class Choice:
    """Patches kept as they are, and merged tokens: (place, features, patches whose `cluster` is that token)."""

    visual: list[int] = dataclasses.field(default_factory=list)
    text: list[int] = dataclasses.field(default_factory=list)
    coverage: list[int] = dataclasses.field(default_factory=list)
    merged: list[tuple[int, Array, list[int]]] = dataclasses.field(default_factory=list)
    leading: list[Array] = dataclasses.field(default_factory=list)  # tokens before all others, of no place
