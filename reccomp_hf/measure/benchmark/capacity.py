"""The largest batch that fits into a GPU's memory, and its decoding speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...data.progress import progress_bar
from .batches import Inputs
from .comparing import BUDGETS, NEW_TOKENS, BudgetLabel, budget_fields
from .contenders import OURS, STOCK, Contender, ours, stock
from .timing import Spread, Stopwatch

LIMIT = 1024
"""Largest number of rows that is tried."""
ROUNDS = 3
_NO_WORKSPACE = "ALLOC_FAILED"
"""In the error of cuBLAS and cuDNN where memory suffices for tensors alone."""


def largest_batches(
    model: Any,
    inputs_of: Callable[[int], Inputs],
    *,
    budgets: Sequence[BudgetLabel] = BUDGETS,
    new_tokens: int = NEW_TOKENS,
    limit: int = LIMIT,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Search the largest batch that a GPU can prefill and decode, for the stock model and for ours.

    Args:
        model: A compressed LLaVA on a GPU, in eval mode.
        inputs_of: Function from a number of rows to the model's inputs.
        budgets: Tokens per image, shares of its patches, or `"dynamic"`.
        new_tokens: Tokens to decode after every prompt.
        limit: Largest number of rows to try.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Returns:
        JSON values: by `"stock"` and `"ours BUDGET"`, the `"batch_size"` and its `"tokens_per_second"` while decoding
        (`None` where nothing fits).

    Raises:
        ValueError: The model is not on a GPU.
    """
    check_gpu(model.device)
    makers: dict[str, Callable[[Inputs], Contender]] = {STOCK: lambda inputs: stock(model, inputs)}
    for budget, fields in budget_fields(model, budgets).items():
        makers[f"{OURS} {budget}"] = _maker(model, fields)
    stopwatch, found = Stopwatch(model.device), {}
    with progress_bar(len(makers), "largest batches", progress) as bar:
        for name, make in makers.items():

            def turn(size: int, make: Callable[[Inputs], Contender] = make) -> float:
                return make(inputs_of(size)).turn(stopwatch, new_tokens)["decode"]

            size = largest(lambda size, turn=turn: runs(lambda: turn(size)), limit)  # type: ignore[misc]
            seconds = Spread(tuple(turn(size) for _ in range(ROUNDS))).median if size else None
            found[name] = {"batch_size": size, "tokens_per_second": None if seconds is None else size / seconds}
            bar.update()
    return found


def check_gpu(device: torch.device) -> None:
    """Refuse a device that does not report when its memory is full.

    Raises:
        ValueError: The device is not a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"The largest batch is searched for on a GPU; the model is on {device}.")


def _maker(model: Any, fields: dict[str, Any]) -> Callable[[Inputs], Contender]:
    return lambda inputs: ours(model, inputs, fields)


def largest(fits: Callable[[int], bool], limit: int = LIMIT) -> int:
    """The largest count up to `limit` for which `fits` holds, 0 if it never does; doubles, then halves the gap.

    A count that fits is taken to fit in every smaller one too.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def runs(work: Callable[[], Any]) -> bool:
    """Do the work; return whether the GPU's memory sufficed."""
    try:
        work()
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and _NO_WORKSPACE not in str(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


__all__ = ["LIMIT", "check_gpu", "largest", "largest_batches", "runs"]
