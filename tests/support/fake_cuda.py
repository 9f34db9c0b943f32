"""A GPU for the recorder of CUDA graphs: what torch's streams, graphs and memory pools demand, without a device.

A pool may be shared while a graph of it lives, and not afterwards. A capture that fails raises once more at its end,
and leaves its stream current, as in torch.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from unittest import mock

import torch


class Stream:
    """A stream that notes which ones it has waited for."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    def wait_event(self, event):
        self.waited.append(event)

    def record_event(self):
        return ("event", self)


class FakeCuda:
    """Stands for `torch.cuda`; `log` holds what was called, in order."""

    def __init__(self):
        self.log, self.current, self.fails, self.numbers = [], Stream(), False, itertools.count()
        self.streams = []
        self.pools: dict[int, weakref.WeakSet] = {}
        fake = self

        class CUDAGraph:
            def replay(self):
                fake.log.append("replay")

        self.CUDAGraph = CUDAGraph

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def new_stream(self):
        self.streams.append(Stream())
        return self.streams[-1]

    def graph_pool_handle(self):
        return next(self.numbers)

    def free_workspaces(self):
        self.log.append("workspaces freed")

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        graphs = self.pools.get(pool)
        if graphs is not None and not graphs:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.log.append(f"capture in pool {pool}")
        self.pools.setdefault(pool, weakref.WeakSet()).add(graph)
        before, self.current = self.current, stream
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = before

    @contextlib.contextmanager
    def installed(self):
        """`torch.cuda` is this one in the context."""
        names = ("current_stream", "set_stream", "graph_pool_handle", "stream", "graph", "CUDAGraph")
        parts = {name: getattr(self, name) for name in names}
        parts |= {"Stream": self.new_stream, "device": lambda device: contextlib.nullcontext()}
        workspaces = mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", self.free_workspaces, create=True)
        with mock.patch.multiple(torch.cuda, **parts), workspaces:
            yield self
