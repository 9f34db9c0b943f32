"""One-dimensional local outlier factor, exact and batched (Breunig et al., "LOF", SIGMOD 2000)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from .tensors import highest_precision


def local_outlier_factor(values: Tensor, n_neighbors: int, valid: Tensor | None = None) -> Tensor:
    """Local outlier factor of every value among the values of its row, as scikit-learn defines it.

    On a line the k nearest neighbours of a value stand next to it in sorted order, so one sort and a window of k
    values to either side give the exact factor: N log N time and N x k memory. Of two neighbours at equal distance
    the smaller value comes first.

    Args:
        values: (..., N), any floating dtype.
        n_neighbors: k; a row of R values uses min(k, R - 1).
        valid: (..., N) bool, `True` where a value takes part; `None` means all.

    Returns:
        (..., N) in float64 (float32 on devices without it); higher means more of an outlier, about 1 inside a
        cluster; 1 for values that do not take part and in rows of fewer than two values.

    Raises:
        ValueError: `n_neighbors` below 1.
    """
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}.")
    values = highest_precision(values)
    values = values if valid is None else values.masked_fill(~valid, torch.inf)
    ordered, order = values.sort(dim=-1, stable=True)
    factor = _sorted_factor(ordered, n_neighbors, None if valid is None else valid.sum(-1, keepdim=True))
    return torch.empty_like(factor).scatter_(-1, order, factor)


@record_function("reccomp::outliers")
def upper_outliers(values: Tensor, n_neighbors: int, threshold: float, valid: Tensor) -> Tensor:
    """Outliers above the middle of their row: factor > threshold and value > median of the row's valid values.

    Args:
        values: (..., N) scores.
        n_neighbors: k of the local outlier factor.
        threshold: Factor above which a value is an outlier.
        valid: (..., N) bool.

    Returns:
        (..., N) bool, `False` where not valid.
    """
    ordered, order = highest_precision(values).masked_fill(~valid, torch.inf).sort(dim=-1, stable=True)
    size = valid.sum(-1, keepdim=True)
    # For an even count the lower of the two middle values: no value lies strictly between them, so "above the
    # median" holds for the same values as with their mean.
    median = ordered.gather(-1, ((size - 1) // 2).clamp(min=0))
    exists = torch.arange(ordered.shape[-1], device=ordered.device) < size
    outlier = (_sorted_factor(ordered, n_neighbors, size) > threshold) & (ordered > median) & exists
    return torch.empty_like(outlier).scatter_(-1, order, outlier)


def _sorted_factor(ordered: Tensor, n_neighbors: int, size: Tensor | None) -> Tensor:
    """Factors of ascending rows (..., N), of which the first `size` (..., 1) values count; `None` means all.

    The k nearest neighbours of a value and itself are k + 1 values in a row: the window is found first, and
    everything after it is read from that window.
    """
    count = ordered.shape[-1]
    k = min(n_neighbors, count - 1)
    if k < 1:
        return torch.ones_like(ordered)
    position = torch.arange(count, device=ordered.device)
    size = torch.full_like(ordered[..., :1], count, dtype=torch.long) if size is None else size
    neighbors = (size - 1).clamp(min=0, max=k)  # (..., 1)
    # A row of k values or fewer is one window; behind its last value there is nothing.
    start = torch.minimum(position - _left_neighbors(ordered, k), size - (k + 1)).clamp(min=0)
    place = torch.arange(k + 1, device=ordered.device)
    windows = (start.unsqueeze(-1) + place).flatten(-2)  # (..., N * (k + 1))
    reach = torch.maximum(ordered - ordered.gather(-1, start), ordered.gather(-1, start + neighbors) - ordered)

    def in_windows(values: Tensor) -> Tensor:
        return values.gather(-1, windows).unflatten(-1, (count, k + 1))  # (..., N, k + 1)

    def mean_of_neighbors(values: Tensor, own: Tensor) -> Tensor:
        values = values.masked_fill(beyond, 0)
        return (values.sum(-1) - own) / divisor

    beyond, divisor = (place > neighbors).unsqueeze(-2), neighbors.clamp(min=1)  # (..., 1, k + 1), (..., 1)
    distance = (in_windows(ordered) - ordered.unsqueeze(-1)).abs()
    density = (mean_of_neighbors(torch.maximum(distance, in_windows(reach)), reach) + 1e-10).reciprocal()
    factor = mean_of_neighbors(in_windows(density), density) / density
    return factor.masked_fill((position >= size) | (neighbors == 0), 1.0)


def _left_neighbors(ordered: Tensor, k: int) -> Tensor:
    """Number of the k nearest neighbours of every value that are on its left: (..., N) -> (..., N) int64."""
    count, ends = ordered.shape[-1], ordered.new_full((*ordered.shape[:-1], k), torch.inf)
    padded = torch.cat([-ends, ordered, ends], dim=-1).unfold(-1, k, 1)  # (..., N + k + 1, k)
    here = ordered.unsqueeze(-1)
    # The m-th value on the left is among the k nearest if the (k + 1 - m)-th on the right is not strictly nearer.
    return (here - padded[..., :count, :] <= padded[..., k + 1 :, :] - here).sum(-1)


__all__ = ["local_outlier_factor", "upper_outliers"]
