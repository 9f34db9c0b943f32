"""Seconds of the stages of a prefill, from the ranges that the model's code marks for torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import record_function

from .timing import Measures
from .tracing import trace

PREFIX = "reccomp::"
WHOLE, REST = "whole", "language model and the rest"


def stage_seconds(work: Callable[[], Any], device: torch.device) -> Measures:
    """Do the work once under the profiler.

    Returns:
        Seconds by stage, without the prefix: on a GPU from a stage's first kernel to the end of its last one,
        elsewhere the host's. Stages may be nested. `"whole"` is the sum of everything, and `REST` the time outside of
        all stages. The profiler takes time itself, so these times cannot be compared with unprofiled ones. Empty
        where the profiler saw no range on the GPU.
    """

    def marked() -> None:
        with record_function(PREFIX + WHOLE):
            work()

    category = "gpu_user_annotation" if device.type == "cuda" else "user_annotation"
    ranges = [
        event
        for event in trace(marked, device)
        if event.get("cat") == category and str(event["name"]).startswith(PREFIX)
    ]
    found: Measures = {}
    for event in ranges:
        name = str(event["name"]).removeprefix(PREFIX)
        found[name] = found.get(name, 0.0) + float(event["dur"]) / 1e6
    if WHOLE in found:
        stages = [event for event in ranges if event["name"] != PREFIX + WHOLE]
        outermost = sum(float(event["dur"]) / 1e6 for event in stages if not _lies_in_any(event, stages))
        found[REST] = max(found[WHOLE] - outermost, 0.0)
    return found


def _lies_in_any(event: dict[str, Any], others: Sequence[dict[str, Any]]) -> bool:
    """Check whether another range of the same thread or stream encloses this one."""

    def ends(one: dict[str, Any]) -> float:
        return float(one["ts"]) + float(one["dur"])

    return any(
        other is not event
        and other["tid"] == event["tid"]
        and float(other["ts"]) <= float(event["ts"])
        and ends(event) <= ends(other)
        for other in others
    )


__all__ = ["PREFIX", "REST", "WHOLE", "stage_seconds"]
