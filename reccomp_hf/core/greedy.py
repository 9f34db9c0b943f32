"""Greedy choices: one patch after the other, each by what was chosen before it; and what their loops share."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .kernels import LARGEST_TABLE, in_one_launch
from .tensors import highest_precision, reads_are_free

_PRODUCTS_AT_ONCE = 5
"""Ratio of the speeds of a matrix product and of single rows' products on one CPU thread, rounded up."""
_PRODUCTS_ALONE = 3
"""The same ratio where numpy makes the products of single rows, and features stay in the CPU's cache."""
_TABLE_BYTES = 2**29
"""Memory of the products of all patches with each other, for as many images as are chosen for at once elsewhere."""
_BLOCK_BYTES = 4 * 2**20
"""Features that a greedy loop reads in every step on a CPU: more would not stay in its cache."""
_ALONE_BYTES = 2**19
"""Features of an image for which numpy's steps, one image after the other, are faster than batched ones."""
_BLOCKS = 4
"""Blocks of an image's patches of which a CPU computes the products one by one."""
NO_LENGTH = 1e-12
"""The least length that features are divided by, as in `torch.nn.functional.normalize`."""


@in_one_launch("farthest")
def farthest_points(distance: Tensor, candidates: Tensor, counts: Tensor, grid: tuple[int, int], steps: int) -> Tensor:
    """Spread `counts` patches evenly: each is the candidate farthest from everything kept so far.

    A row holds one grid or several in sequence; cells of different grids count as farther apart than cells of one grid
    can be. The loop runs over steps, for all rows at once. Among equally far candidates the first one is taken.

    Args:
        distance: (B, cells) int64, squared distance of every cell to the kept cells, from `squared_distances`.
        candidates: (B, cells) bool, patches to choose from.
        counts: (B,) int, how many to choose.
        grid: (rows, columns) of one grid.
        steps: The largest of `counts`.

    Returns:
        (B, cells) bool.
    """
    cell = torch.arange(candidates.shape[1], device=candidates.device)
    area = grid[0] * grid[1]
    # Grids lie so far apart that a kept cell of one grid is never the nearest to a cell of another.
    row = highest_precision(cell % area // grid[1] + 2 * (grid[0] + grid[1]) * (cell // area))
    column, one = highest_precision(cell % grid[1]), row.new_ones(row.shape)
    length = row.square() + column.square()
    # The squared distance of a pick p and a cell x as one product of rows: |p|^2 - 2 p x + |x|^2, exact for integers.
    picked, cells = torch.stack([length, -2 * row, -2 * column, one], -1), torch.stack([one, row, column, length])
    gap = highest_precision(distance).masked_fill(~candidates, -1)  # -1: not to be chosen; 0 once it is chosen
    picks = []
    for _ in range(steps):
        picks.append(pick := gap.argmax(-1))  # (B,)
        gap = torch.minimum(gap, picked[pick] @ cells)
    return first_picks(picks, counts, candidates)


def herd_patches(states: Tensor, members: Tensor, candidates: Tensor, counts: Tensor, steps: int) -> Tensor:
    """Choose `counts` patches whose mean direction stays as close as possible to the mean direction of all members.

    Kernel herding (Welling, ICML 2009) with the linear kernel of features divided by their lengths, in float32. The
    loop runs over steps, for all rows at once; on a CPU large images take their steps one after the other. Among equal
    candidates the first one is taken.

    Args:
        states: (B, N, C) features, any floating dtype.
        members: (B, N) bool, patches whose mean is approximated.
        candidates: (B, N) bool, patches to choose from.
        counts: (B,) int, how many to choose; no more than there are candidates.
        steps: No entry of `counts` is larger.

    Returns:
        (B, N) bool.
    """
    return in_blocks(_herd, (states, members, candidates, counts), steps, alone=_herd_alone)


def _herd(states: Tensor, members: Tensor, candidates: Tensor, counts: Tensor, steps: int) -> Tensor:
    """`herd_patches` of some rows."""
    units = torch.nn.functional.normalize(states.float(), dim=-1)
    patches = units.transpose(1, 2)  # (B, C, N)
    share = members.to(units.dtype) / members.sum(-1, keepdim=True).clamp(min=1)
    mean = share.unsqueeze(1) @ units  # (B, 1, C)
    toward = 2 * (mean @ patches)  # (B, 1, N)
    # How much closer a patch brings the sum of the chosen ones to a multiple of the mean that grows with every step.
    gain = toward - torch.linalg.vector_norm(units, dim=-1).square().unsqueeze(1)
    gain = gain.masked_fill(~candidates.unsqueeze(1), -torch.inf)  # (B, 1, N)
    if not products_one_by_one(units, steps):
        table = torch.baddbmm(toward, units, patches, alpha=-2)  # (B, N, N)
        table.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return follow(table, gain, gain, candidates, counts, steps, True)
    picks = []
    for _ in range(steps):
        picks.append(pick := gain.argmax(-1, keepdim=True))  # (B, 1, 1)
        gain = torch.baddbmm(gain, take_row(units, pick) - mean, patches, alpha=-2).scatter_(-1, pick, -torch.inf)
    return first_picks(picks, counts, candidates)


def _herd_alone(states: Tensor, members: Tensor, candidates: Tensor, counts: Tensor, steps: int) -> Tensor:
    """`_herd` of one image by numpy: lengths divide the products and not the features."""
    states, member = states[0].float(), members[0].numpy()
    vectors = states.numpy()
    lengths = lengths_alone(vectors)
    scale = 1 / np.maximum(lengths, NO_LENGTH)
    twice, share = 2 * scale, scale * member / max(1, int(member.sum()))
    center = (torch.from_numpy(share) @ states).numpy()  # (C,), the mean
    gain = np.where(candidates[0].numpy(), twice * products_alone(vectors, center) - (lengths * scale) ** 2, -np.inf)
    picks: list[int] = []
    for _ in range(steps):
        if picks:
            pick = picks[-1]
            gain -= twice * products_alone(vectors, scale[pick] * vectors[pick] - center)
            gain[pick] = -np.inf
        picks.append(int(gain.argmax()))
    return chosen_alone(picks, candidates)


@in_one_launch("follow")
def follow(
    table: Tensor, first: Tensor, then: Tensor, candidates: Tensor, counts: Tensor, steps: int, add: bool
) -> Tensor:
    """Choose the patch of highest score again and again; each pick changes all scores by its row of a table.

    Args:
        table: (B, N, N) floats, symmetric or not.
        first: (B, 1, N), scores of the first choice.
        then: (B, 1, N), the scores that the first pick changes.
        candidates: (B, N) bool, patches that count once they are chosen.
        counts: (B,) int, how many to choose.
        steps: No entry of `counts` is larger.
        add: Whether a row is added to the scores; else the lower number of both is the new score.

    Returns:
        (B, N) bool.
    """
    picks: list[Tensor] = []
    for _ in range(steps):
        if picks:
            row = take_row(table, picks[-1])
            first = then = then + row if add else torch.minimum(then, row)
        picks.append(first.argmax(-1, keepdim=True))  # (B, 1, 1)
    return first_picks(picks, counts, candidates)


def in_blocks(
    choose: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    steps: int,
    row_bytes: int | None = None,
    alone: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Run a greedy loop for as many rows at once as there is memory for tables.

    On a CPU, for as many as fit into its cache, and no longer than needed.

    Args:
        choose: `choose(*arguments, steps)` chooses patches in `steps` steps: (B, N) bool.
        arguments: Tensors of B rows each, the features first and the numbers of patches to choose, (B,), last.
        steps: No number is larger.
        row_bytes: Bytes that a step reads of a row; by default those of its features.
        alone: `choose` for one row that chooses `steps` patches, in numpy, with products of one pick at a time. It is
            taken on a CPU for large images and for a single one that chooses few patches: a step has several
            operators, and one of numpy begins sooner than one of torch.
    """
    features, counts = arguments[0], arguments[-1]
    if not reads_are_free(features) or not len(features):
        at_once = max(1, _TABLE_BYTES // (8 * features.shape[1] ** 2))  # tables of float64
        if len(features) <= at_once:
            return choose(*arguments, steps)
        parts = zip(*(torch.split(argument, at_once) for argument in arguments), strict=True)
        return torch.cat([choose(*part, steps) for part in parts])
    row_bytes = features[0].nbytes if row_bytes is None else row_bytes
    ratio = _PRODUCTS_ALONE if row_bytes <= _BLOCK_BYTES else _PRODUCTS_AT_ONCE
    most_alone = 0 if alone is None else features.shape[1] // ratio
    is_large = row_bytes >= _ALONE_BYTES and steps <= most_alone
    rows = 1 if is_large else max(1, _BLOCK_BYTES // max(1, row_bytes))
    blocks = [torch.split(argument, rows) for argument in arguments]
    # The largest count by the length of a histogram, not by item(): tests refuse reads, with a CPU in place of a GPU.
    longest = [len(block.bincount()) - 1 for block in counts.split(rows)]
    chosen = []
    with np.errstate(all="ignore"):  # infinite features and NaN, as torch takes them
        for *block, most in zip(*blocks, longest, strict=True):
            by_numpy = len(block[0]) == 1 and 0 < most <= most_alone
            chosen.append((alone if alone and by_numpy else choose)(*block, most))
    return torch.cat(chosen)


def products_one_by_one(vectors: Tensor, steps: int) -> bool:
    """Whether to multiply each pick with all patches rather than all with all: few picks on a CPU, else many patches.

    Args:
        vectors: (B, N, C).
        steps: Number of picks.
    """
    least = _PRODUCTS_AT_ONCE * steps if vectors.device.type == "cpu" else LARGEST_TABLE + 1
    return vectors.shape[1] >= least


def products_alone(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Products of vectors (N, C) with another one, (C,): (N,).

    They are N products of two vectors to numpy, which makes them on this thread. A product of a matrix and a vector
    would start threads of numpy's own, as many as there are cores.
    """
    return np.matmul(vectors[:, np.newaxis], vector)[:, 0]


def lengths_alone(vectors: np.ndarray) -> np.ndarray:
    """Lengths of vectors (N, C): (N,)."""
    return np.sqrt(np.matmul(vectors[:, np.newaxis], vectors[:, :, np.newaxis])[:, 0, 0])


def chosen_alone(picks: list[int], candidates: Tensor) -> Tensor:
    """(1, N) bool: the picks, as far as they are candidates."""
    chosen = np.zeros(candidates.shape, dtype=bool)
    chosen[0, picks] = True
    return torch.from_numpy(chosen) & candidates


def products_of_all(vectors: Tensor) -> Tensor:
    """Products of all vectors of a row with each other: (B, N, C) -> (B, N, N), alike both ways but for rounding.

    On a CPU, where a product takes the longest, those of different blocks are computed once and copied.
    """
    count = vectors.shape[1]
    if vectors.device.type != "cpu":
        return vectors @ vectors.transpose(1, 2)
    products = vectors.new_empty(len(vectors), count, count)
    ends = [count * block // _BLOCKS for block in range(_BLOCKS + 1)]
    for start, end in itertools.pairwise(ends):
        products[:, start:end, start:] = vectors[:, start:end] @ vectors[:, start:].transpose(1, 2)
        products[:, end:, start:end] = products[:, start:end, end:].transpose(1, 2)
    return products


def take_row(values: Tensor, pick: Tensor) -> Tensor:
    """One entry of each row: (B, N, C) at (B, 1, 1) -> (B, 1, C)."""
    return values.gather(1, pick.expand(-1, -1, values.shape[-1]))


def first_picks(picks: list[Tensor], counts: Tensor, candidates: Tensor) -> Tensor:
    """(B, N) bool: the first `counts` of the picks, B indices each, as far as they are candidates."""
    if not picks:
        return torch.zeros_like(candidates)
    taken = torch.arange(len(picks), device=counts.device) < counts.unsqueeze(-1)  # (B, steps)
    order = torch.stack(picks, -1).view_as(taken)
    times = torch.zeros_like(candidates, dtype=torch.long).scatter_add(-1, order, taken.long())
    return (times > 0) & candidates


__all__ = [
    "NO_LENGTH",
    "chosen_alone",
    "farthest_points",
    "first_picks",
    "follow",
    "herd_patches",
    "in_blocks",
    "lengths_alone",
    "products_alone",
    "products_of_all",
    "products_one_by_one",
    "take_row",
]
