"""Tensor tools that the methods share: choosing entries of each row by score or by distance, gathering, averaging."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_PRODUCTS_AT_ONCE = 5
"""Ratio of the speeds of a matrix product and of single rows' products on one CPU thread, rounded up."""
_LARGEST_TABLE = 1024
"""Patches of an image of which all products with each other are kept elsewhere."""
_BLOCK_BYTES = 4 * 2**20
"""Features that a greedy loop reads in every step on a CPU: more would not stay in its cache."""
_BLOCKS = 4
"""Blocks of an image's patches of which a CPU computes the products one by one."""

_USED: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("_USED", default=None)


def constant(like: Tensor, make: Callable[..., Any], *arguments: Any) -> Tensor:
    """The tensor of `make(*arguments)` on the device of another tensor, made once per device and arguments.

    A copy from the host makes a GPU's stream wait, and cannot be captured in a CUDA graph: a constant is copied at its
    first use. Traced code (`torch.compile`, `torch.export`, fake tensors) neither keeps nor reads kept ones.

    Args:
        like: A tensor on the wanted device.
        make: A function that returns a tensor on the host, or numbers in tuples or lists.
        *arguments: Hashable arguments of the function.

    Returns:
        A shared tensor: it must not be changed.
    """
    if _is_traced(like):
        return torch.as_tensor(make(*arguments)).to(like.device)
    tensor = _kept_constant(like.device, make, _types(arguments), *arguments)
    if (constants := _USED.get()) is not None:
        constants.append(tensor)
    return tensor


def reads_are_free(like: Tensor) -> bool:
    """Whether values of a tensor may be read: on a CPU, by code that is neither traced nor recorded."""
    return like.device.type == "cpu" and not _is_traced(like) and _USED.get() is None


def _is_traced(like: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(like) is not Tensor


@contextlib.contextmanager
def used_constants() -> Iterator[list[Tensor]]:
    """A list of the constants that are used in the context: a recording must keep those whose memory it reads."""
    token = _USED.set([])
    try:
        yield _USED.get()  # type: ignore[misc]
    finally:
        _USED.reset(token)


def _types(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Types of values, at every depth: (True, False) and (1, 0) are equal, but make different tensors."""
    return tuple(_types(value) if type(value) is tuple else type(value) for value in values)


@functools.lru_cache(maxsize=128)
def _kept_constant(device: torch.device, make: Callable[..., Any], types: tuple[Any, ...], *arguments: Any) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not serve a training step later
        return torch.as_tensor(make(*arguments)).to(device)


def full_precision(values: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context without autocast on the device of the values: scores are float32 whatever the model runs in."""
    kind = values.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def highest_precision(values: Tensor) -> Tensor:
    """The values in float64 if the device has it, else in float32."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def top_mask(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    """The `counts` candidates with the highest scores of each row; among equal scores the lower index wins.

    Args:
        scores: (B, N) float.
        counts: (B,) int.
        candidates: (B, N) bool.

    Returns:
        (B, N) bool.
    """
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    in_order = candidates.gather(-1, order)
    taken = in_order & (in_order.cumsum(-1) <= counts.unsqueeze(-1))
    return torch.zeros_like(candidates).scatter_(-1, order, taken)


def nonzero_first(mask: Tensor, length: int) -> Tensor:
    """Indices of the `True` entries of each row in ascending order, padded with others: (B, N) -> (B, length)."""
    trues = mask.cumsum(-1)
    place = torch.where(mask, trues, trues[:, -1:] + positions(mask) + 1 - trues) - 1  # True entries first
    index = torch.empty_like(place).scatter_(-1, place, positions(mask))[:, :length]
    return torch.nn.functional.pad(index, (0, max(length - mask.shape[1], 0)))


def positions(rows: Tensor) -> Tensor:
    """0, 1, 2, ... along every row: (B, N) -> (B, N) int64."""
    return torch.arange(rows.shape[-1], device=rows.device).expand_as(rows)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, N, C) at index (B, K) -> (B, K, C)."""
    return values[torch.arange(len(index), device=index.device).unsqueeze(-1), index]


def pack_rows(values: Tensor, counts: Tensor, total: int, exact: bool = True) -> Tensor:
    """The first `counts` entries of every row, one row after the other: (B, K, ...) -> (total, ...).

    A `total` that is not `exact` may be above the sum of the counts; then other entries follow.
    """
    rows, width = values.shape[:2]
    if exact and rows * width == total:
        return values.flatten(0, 1)
    entry, ends = torch.arange(total, device=counts.device), counts.cumsum(0)
    row = torch.searchsorted(ends, entry, right=True)
    if not exact:
        row = row.clamp(max=rows - 1)
    column = entry - (ends - counts)[row]
    return values[row, column if exact else column.clamp(max=width - 1)]


def cluster_means(states: Tensor, cluster: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Weighted mean of every cluster, in float32 at least; differentiable in `states`.

    Args:
        states: (B, N, C).
        cluster: (B, N) int64, -1 for none.
        weights: (B, N) float, not negative; a cluster whose weights are all 0 gets the plain mean.
        clusters: M, number of clusters.

    Returns:
        (B, M, C) in the dtype of `states`; 0 for an empty cluster.
    """
    with torch.no_grad():
        member = cluster.unsqueeze(1) == torch.arange(clusters, device=cluster.device).unsqueeze(-1)  # (B, M, N)
        shares = member * weights.unsqueeze(1)
        peak = shares.amax(-1, keepdim=True)
        shares = torch.where(peak > 0, shares / peak, member.to(shares.dtype))
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1)
    precise = torch.promote_types(states.dtype, torch.float32)
    with full_precision(states):
        return (shares.to(precise) @ states.to(precise)).to(states.dtype)


def squared_distances(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squared distance of every cell to the nearest `True` cell of its grid, rows first, then columns.

    Args:
        mask: (B, rows * columns) bool in raster order.
        grid: (rows, columns).

    Returns:
        (B, rows * columns) int64; `farthest(grid)` where a grid has no `True` cell.
    """
    cells = mask.reshape(-1, *grid)
    rows, columns = (torch.arange(size, device=mask.device) for size in grid)
    along_row = torch.where(cells.unsqueeze(2), (columns[:, None] - columns) ** 2, farthest(grid)).amin(-1)
    between_rows = ((rows[:, None] - rows) ** 2)[None, :, :, None]  # (1, rows, rows, 1)
    return (along_row.unsqueeze(1) + between_rows).amin(2).flatten(1)


def farthest(grid: tuple[int, int]) -> int:
    """A number above any squared distance on the grid."""
    return (grid[0] + grid[1]) ** 2


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


def herd_patches(units: Tensor, members: Tensor, candidates: Tensor, counts: Tensor, steps: int) -> Tensor:
    """Choose `counts` patches whose mean stays as close as possible to the mean of all members.

    Kernel herding (Welling, ICML 2009) with the linear kernel. The loop runs over steps, for all rows at once. Among
    equal candidates the first one is taken.

    Args:
        units: (B, N, C) float32 features of length 1.
        members: (B, N) bool, patches whose mean is approximated.
        candidates: (B, N) bool, patches to choose from.
        counts: (B,) int, how many to choose; no more than there are candidates.
        steps: No entry of `counts` is larger.

    Returns:
        (B, N) bool.
    """
    return in_blocks(_herd, (units, members, candidates, counts), steps)


def _herd(units: Tensor, members: Tensor, candidates: Tensor, counts: Tensor, steps: int) -> Tensor:
    """`herd_patches` of some rows."""
    patches = units.transpose(1, 2)  # (B, C, N)
    share = members.to(units.dtype) / members.sum(-1, keepdim=True).clamp(min=1)
    mean = share.unsqueeze(1) @ units  # (B, 1, C)
    toward = 2 * (mean @ patches)  # (B, 1, N)
    if products_one_by_one(units, steps):

        def add_change(gain: Tensor, pick: Tensor) -> Tensor:
            return torch.baddbmm(gain, take_row(units, pick) - mean, patches, alpha=-2).scatter_(-1, pick, -torch.inf)
    else:
        table = torch.baddbmm(toward, units, patches, alpha=-2)  # (B, N, N)
        table.diagonal(dim1=1, dim2=2).fill_(-torch.inf)

        def add_change(gain: Tensor, pick: Tensor) -> Tensor:
            return gain + take_row(table, pick)

    # How much closer a patch brings the sum of the chosen ones to a multiple of the mean that grows with every step.
    gain = toward - torch.linalg.vector_norm(units, dim=-1).square().unsqueeze(1)
    gain = gain.masked_fill(~candidates.unsqueeze(1), -torch.inf)  # (B, 1, N)
    picks = []
    for _ in range(steps):
        picks.append(pick := gain.argmax(-1, keepdim=True))  # (B, 1, 1)
        gain = add_change(gain, pick)
    return first_picks(picks, counts, candidates)


def in_blocks(
    choose: Callable[..., Tensor], arguments: tuple[Tensor, ...], steps: int, row_bytes: int | None = None
) -> Tensor:
    """Run a greedy loop for all rows at once; on a CPU for as many as fit into its cache, and no longer than needed.

    Args:
        choose: `choose(*arguments, steps)` chooses patches in `steps` steps: (B, N) bool.
        arguments: Tensors of B rows each, the features first and the numbers of patches to choose, (B,), last.
        steps: No number is larger.
        row_bytes: Bytes that a step reads of a row; by default those of its features.
    """
    features, counts = arguments[0], arguments[-1]
    if not reads_are_free(features) or not len(features):
        return choose(*arguments, steps)
    rows = max(1, _BLOCK_BYTES // max(1, features[0].nbytes if row_bytes is None else row_bytes))
    blocks = [torch.split(argument, rows) for argument in arguments]
    # The largest count by the length of a histogram, not by item(): tests refuse reads, with a CPU in place of a GPU.
    longest = [len(block.bincount()) - 1 for block in counts.split(rows)]
    return torch.cat([choose(*block, most) for *block, most in zip(*blocks, longest, strict=True)])


def products_one_by_one(vectors: Tensor, steps: int) -> bool:
    """Whether to multiply each pick with all patches rather than all with all: few picks on a CPU, else many patches.

    Args:
        vectors: (B, N, C).
        steps: Number of picks.
    """
    least = _PRODUCTS_AT_ONCE * steps if vectors.device.type == "cpu" else _LARGEST_TABLE + 1
    return vectors.shape[1] >= least


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
    "cluster_means",
    "constant",
    "farthest_points",
    "first_picks",
    "full_precision",
    "gather_rows",
    "herd_patches",
    "highest_precision",
    "in_blocks",
    "nonzero_first",
    "pack_rows",
    "positions",
    "products_of_all",
    "products_one_by_one",
    "reads_are_free",
    "squared_distances",
    "take_row",
    "top_mask",
    "used_constants",
]
