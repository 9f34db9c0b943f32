"""One-dimensional local outlier factor, exact and batched (Breunig et al., "LOF", SIGMOD 2000)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    window = min(n_neighbors, values.shape[-1] - 1)
    if window < 1:
        return torch.ones_like(values)
    ordered, order = values.masked_fill(~valid, torch.inf).sort(dim=-1, stable=True)
    size = valid.sum(-1, keepdim=True)  # (..., 1)
    k = (size - 1).clamp(max=window)  # (..., 1)
    neighbors, is_neighbor = _neighbors(ordered, size, k, window)  # (..., N, 2 * window)
    distance = (ordered.unsqueeze(-1) - _take(ordered, neighbors)).abs()
    reach = distance.masked_fill(~is_neighbor, 0).amax(-1)  # distance to the k-th neighbour
    reachability = torch.maximum(distance, _take(reach, neighbors))
    count = k.clamp(min=1)
    density = 1 / (_masked_sum(reachability, is_neighbor) / count + 1e-10)
    factor = _masked_sum(_take(density, neighbors), is_neighbor) / count / density
    takes_part = (torch.arange(values.shape[-1], device=values.device) < size) & (k > 0)
    factor = torch.where(takes_part, factor, torch.ones_like(factor))
    return torch.empty_like(factor).scatter_(-1, order, factor)


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
    ordered = values.masked_fill(~valid, torch.inf).sort(dim=-1).values
    middle = ((valid.sum(-1, keepdim=True) - 1) // 2).clamp(min=0)
    # For an even count the lower of the two middle values: no value lies strictly between them, so "above the
    # median" holds for the same values as with their mean.
    median = ordered.gather(-1, middle)
    return (local_outlier_factor(values, n_neighbors, valid) > threshold) & (values > median) & valid


def _neighbors(ordered: Tensor, size: Tensor, k: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Positions of up to `window` values on either side, and which of them are among the k nearest."""
    position = torch.arange(ordered.shape[-1], device=ordered.device).unsqueeze(-1)  # (N, 1)
    step = torch.arange(1, window + 1, device=ordered.device)  # (window,)
    left, right = position - step, position + step  # (N, window)
    left_exists, right_exists = left >= 0, right < size.unsqueeze(-1)
    left, right = left.clamp(min=0), right.clamp(max=ordered.shape[-1] - 1)
    here = ordered.unsqueeze(-1)
    left_distance = (here - _take(ordered, left)).masked_fill(~left_exists, torch.inf)
    right_distance = (_take(ordered, right) - here).masked_fill(~right_exists, torch.inf)
    # The m-th value on the left is among the k nearest if the (k + 1 - m)-th on the right is not strictly nearer.
    counterpart = (k.unsqueeze(-1) - step).expand(left_distance.shape)
    rival = right_distance.gather(-1, counterpart.clamp(min=0))
    from_left = (left_distance <= rival) & left_exists & (counterpart >= 0)
    from_right = (step <= k.unsqueeze(-1) - from_left.sum(-1, keepdim=True)) & right_exists
    both = torch.cat([left.expand(from_left.shape), right.expand(from_left.shape)], dim=-1)
    return both, torch.cat([from_left, from_right], dim=-1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values (..., N) at index (N, w) or (..., N, w) -> (..., N, w)."""
    index = index.expand(*values.shape, index.shape[-1])
    return values.unsqueeze(-2).expand(*values.shape, values.shape[-1]).gather(-1, index)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0).sum(-1)


__all__ = ["local_outlier_factor", "upper_outliers"]
