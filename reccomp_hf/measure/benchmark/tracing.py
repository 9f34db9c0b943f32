"""The trace of torch's profiler as a list of events."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def trace(work: Callable[[], Any], device: torch.device, memory: bool = False) -> list[dict[str, Any]]:
    """Do the work once under the profiler, to its end on the device.

    Args:
        work: The work; its result is dropped.
        device: The device that the work runs on.
        memory: Record allocations.

    Returns:
        Events in the format of Chrome's traces; `"ts"` and `"dur"` in microseconds.
    """
    gpu = device.type == "cuda"
    if gpu:  # as torch does for its own CUDA graphs: where the profiler goes away, the next one crashes on a graph
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, profile_memory=memory) as profiler:
        work()
        if gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


__all__ = ["trace"]
