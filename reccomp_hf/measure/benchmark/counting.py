"""Counts next to the times: reads of the device, memory, bytes of the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .tracing import trace

CPU_READS = "reads of tensors by the host, each of which would make it wait for a GPU"
CUDA_READS = "synchronisations, by torch.cuda.set_sync_debug_mode"
CPU_LAUNCHES = "operators, each of which would launch a kernel or none on a GPU"
CUDA_LAUNCHES = "kernels, graphs, copies and fills that the host launches, by torch's profiler"
CPU_MEMORY = "peak of what torch's CPU allocator gave out during a prefill, beyond what it held before"
CUDA_MEMORY = "torch.cuda.max_memory_allocated during a prefill"


def device_reads(work: Callable[[], Any], device: torch.device) -> int:
    """Number of times the host waits for the device, or on a CPU would have to (see `CPU_READS`)."""
    return _cuda_reads(work) if device.type == "cuda" else _cpu_reads(work)


def launches(work: Callable[[], Any], device: torch.device) -> int:
    """Number of times the host gives the device work: `CUDA_LAUNCHES`, on a CPU `CPU_LAUNCHES`."""
    if device.type != "cuda":
        with _Operators() as operators:
            work()
        return operators.count
    names = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    events = [event for event in trace(work, device) if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return sum(any(name in event.get("name", "") for name in names) for event in events)


def peak_memory(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Peak memory of the work.

    Returns:
        `"beyond"`: bytes allocated on top of those held before. `"total"`: all bytes, weights included; `None` on a
        CPU, where this is unknown. `"how"`: how they were measured.
    """
    if device.type != "cuda":
        return {"beyond": _cpu_peak(work), "total": None, "how": CPU_MEMORY}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"beyond": peak - before, "total": peak, "how": CUDA_MEMORY}


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a key-value cache of transformers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _cache_tensors(cache))


def _cache_tensors(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def _cuda_reads(work: Callable[[], Any]) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _cpu_reads(work: Callable[[], Any]) -> int:
    with _ReadingOperators() as operators, _ReadingMethods() as methods:
        work()
    return operators.count + methods.count


class _ReadingOperators(TorchDispatchMode):
    """Counts operators whose result, or whose output's shape, the host must read."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        open_ended = name == "repeat_interleave" and kwargs.get("output_size") is None
        self.count += name in self.NAMES or by_mask or open_ended
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _ReadingMethods(TorchFunctionMode):
    """Counts the methods that read a tensor on a CPU without an operator; one read for any number of elements."""

    METHODS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.METHODS
        return func(*args, **(kwargs or {}))


def _cpu_peak(work: Callable[[], Any]) -> int:
    events = [event for event in trace(work, torch.device("cpu"), memory=True) if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


__all__ = [
    "CPU_LAUNCHES",
    "CPU_MEMORY",
    "CPU_READS",
    "CUDA_LAUNCHES",
    "CUDA_MEMORY",
    "CUDA_READS",
    "cache_bytes",
    "device_reads",
    "launches",
    "peak_memory",
]
