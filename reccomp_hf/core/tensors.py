"""Tensor tools that the methods share: choosing entries of each row by score, gathering, averaging, distances."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
    if is_traced(like):
        return torch.as_tensor(make(*arguments)).to(like.device)
    tensor = _kept_constant(like.device, make, _types(arguments), *arguments)
    if (constants := _USED.get()) is not None:
        constants.append(tensor)
    return tensor


def reads_are_free(like: Tensor) -> bool:
    """Whether values of a tensor may be read: on a CPU, by code that is neither traced nor recorded."""
    return like.device.type == "cpu" and not is_traced(like) and _USED.get() is None


def is_traced(like: Tensor) -> bool:
    """Whether code that gets this tensor is traced, by `torch.compile`, `torch.export` or fake tensors."""
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


def precise_features(features: Tensor) -> Tensor:
    """Features (..., N, C) for greedy choices by cosines: few dimensions in the highest precision, else float32."""
    few = features.shape[-1] <= features.shape[-2]
    return highest_precision(features) if few else features.to(torch.promote_types(features.dtype, torch.float32))


def round_up(number: int, step: int) -> int:
    """The least multiple of a step that is not below a number."""
    return -(-number // step) * step


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
    return torch.empty_like(candidates).scatter_(-1, order, taken)


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


__all__ = [
    "cluster_means",
    "constant",
    "full_precision",
    "gather_rows",
    "highest_precision",
    "is_traced",
    "nonzero_first",
    "pack_rows",
    "positions",
    "precise_features",
    "reads_are_free",
    "round_up",
    "squared_distances",
    "top_mask",
    "used_constants",
]
