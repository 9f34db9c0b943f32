"""The largest batch that fits into a GPU's memory, and what it decodes."""

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
"""No more rows than these are tried."""
ROUNDS = 3


def largest_batches(
    model: Any,
    inputs_of: Callable[[int], Inputs],
    *,
    budgets: Sequence[BudgetLabel] = BUDGETS,
    new_tokens: int = NEW_TOKENS,
    limit: int = LIMIT,
    progress: bool | None = None,
) -> dict[str, Any]:
    """The largest batch that a GPU reads and answers, of the stock model and of ours, and the tokens it decodes.

    Args:
        model: A compressed LLaVA on a GPU, in eval mode.
        inputs_of: Rows -> what the model is asked.
        budgets: As in [`compare`].
        new_tokens: Tokens decoded behind every prompt.
        limit: No more rows than these are tried.
        progress: Show a progress bar; `None` where stderr is a terminal.

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
    """Refuse a device that cannot say that its memory is full.

    Raises:
        ValueError: It is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"The largest batch is searched for on a GPU; the model is on {device}.")


def _maker(model: Any, fields: dict[str, Any]) -> Callable[[Inputs], Contender]:
    return lambda inputs: ours(model, inputs, fields)


def largest(fits: Callable[[int], bool], limit: int = LIMIT) -> int:
    """The largest count up to `limit` for which `fits` holds, 0 if it never does; doubles, then halves the gap.

    What fits is taken to fit in smaller counts too.
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
    """Do the work; whether the GPU's memory sufficed."""
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


__all__ = ["LIMIT", "check_gpu", "largest", "largest_batches", "runs"]
