"""Checks of the tensors of a call: types, shapes, and on a CPU values, which a GPU is not asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensors import reads_are_free


def check_tensor(name: str, value: Any) -> None:
    """Refuse an argument that is neither a tensor of real numbers nor `None`.

    Without `return_tensors` a processor returns lists.
    """
    if value is not None and not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor, got {type(value).__name__}: call the processor with return_tensors='pt'."
        )
    if value is not None and (value.is_complex() or value.layout is not torch.strided):
        raise ValueError(f"{name} must be a dense tensor of real numbers, got {value.dtype} with {value.layout}.")


def check_ids(name: str, value: Any, dimensions: int | None) -> None:
    """Refuse ids that are not an integer tensor, or have another number of dimensions than a given one."""
    check_tensor(name, value)
    if value is None:
        raise ValueError(f"{name} must be a tensor, got None: the processor returns it.")
    if value.dtype not in (torch.int64, torch.int32) or dimensions not in (None, value.ndim):
        raise ValueError(
            f"{name} must be an integer tensor{'' if dimensions is None else f' of {dimensions} dimensions'}, got "
            f"{value.dtype} of shape {tuple(value.shape)}; int64 and int32 are read."
        )


def check_known_ids(name: str, ids: Tensor, vocabulary: int, ignored: int | None = None) -> None:
    """Refuse ids, on a CPU, that an embedding of some tokens does not have; `ignored` may occur besides them."""
    if not reads_are_free(ids):
        return
    unknown = (ids < 0) | (ids >= vocabulary)
    if _occurs(unknown if ignored is None else unknown & (ids != ignored)):
        besides = "" if ignored is None else f" or {ignored}"
        raise ValueError(
            f"{name} must be ids from 0 to {vocabulary - 1}{besides}, got {int(ids.min())} to {int(ids.max())}: use "
            "the processor of this checkpoint, whose tokenizers fit it."
        )


def check_mask(name: str, mask: Tensor | None, like: str, shape: torch.Size) -> None:
    """Refuse a mask of another shape, and on a CPU one to be added to attention scores: 0 and -inf."""
    check_tensor(name, mask)
    if mask is None:
        return
    if mask.shape != shape:
        raise ValueError(f"{name} must have the shape of {like} {tuple(shape)}, got {tuple(mask.shape)}.")
    if reads_are_free(mask) and _occurs(~(mask >= 0)):
        raise ValueError(
            f"{name} must be 1 for tokens and 0 for padding, got negative values or NaN, as a mask that is added to "
            "attention scores has them: pass the processor's."
        )


def _occurs(condition: Tensor) -> bool:
    """Whether a bool tensor on a CPU holds a true value: its counts then reach to 1."""
    return len(condition.flatten().int().bincount()) > 1


__all__ = ["check_ids", "check_known_ids", "check_mask", "check_tensor"]
