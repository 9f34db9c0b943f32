"""The processes of a run, as accelerate launched them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_TIMEOUT = datetime.timedelta(days=30)  # how long a process waits for the others; the launcher ends it if one fails

T = TypeVar("T")


def process_state(device: str | None = None) -> Any:
    """This process among those that accelerate launched together; the first call decides on the backend.

    Args:
        device: `"cpu"`, or anything else for GPUs; by default GPUs if there are any. It selects how processes
            communicate.
    """
    from accelerate import PartialState

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return PartialState(device == "cpu", timeout=_TIMEOUT)


def broadcast(state: Any, compute: Callable[[], T]) -> T:
    """Compute a value in the main process and return it in every process; an error is raised in every process."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]
    if state.is_main_process:
        try:
            result[0] = compute()
        except (ValueError, OSError, RuntimeError) as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


__all__ = ["broadcast", "process_state"]
