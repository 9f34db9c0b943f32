"""CUDA graphs of a model's computations: recorded at the first call of a shape, replayed at the next ones."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .tensors import used_constants

logger = logging.getLogger(__name__)

Tensors: TypeAlias = "dict[str, Tensor]"
Computation: TypeAlias = "Callable[[Tensors], Tensors]"

WARM_UPS = 3
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # PEFT's, of an adapted module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Recorder(Protocol):
    """Records a computation, so that it can be repeated on other values in the same memory."""

    device_type: str

    def turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """A context in which buffers are written, recordings repeated, and results copied: one after the other."""

    def __call__(self, computation: Computation, inputs: Tensors) -> tuple[Callable[[], None], Tensors]:
        """Record the computation on its input buffers.

        Returns:
            A function that repeats it, and the tensors that hold its results afterwards.

        Raises:
            RuntimeError: The computation reads the device, or does something else that cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs, all of which share one memory pool."""

    device_type = "cuda"

    def __init__(self) -> None:
        """Leave the pool to the first recording."""
        self._pool: Any = None
        self._last_turn: Any = None

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Wait, on the device, for the turn before, which may have been on another stream."""
        with torch.cuda.device(device):
            if self._last_turn is not None:
                torch.cuda.current_stream().wait_event(self._last_turn)
            yield
            self._last_turn = torch.cuda.current_stream().record_event()

    def __call__(self, computation: Computation, inputs: Tensors) -> tuple[Callable[[], None], Tensors]:
        """Run the computation a few times on a stream of its own, then capture it; no compiler is involved."""
        device = next(iter(inputs.values())).device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    computation(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = computation(inputs)
        return graph.replay, outputs


@dataclasses.dataclass
class _Recording:
    inputs: Tensors
    replay: Callable[[], None]
    outputs: Tensors
    constants: list[Tensor]


class GraphCache:
    """The recordings of one model's computations.

    A recording belongs to a key, to the shapes and types of its inputs, and to the weights, which it reads where they
    are in memory: weights that are changed in place are seen. Before every run the modules are walked. If weights are
    at other addresses (moved, replaced, loaded again), if adapters were switched, scaled or merged, or if modules or
    their `forward` were exchanged, all recordings are dropped.
    """

    def __init__(self, limit: int = 16, recorder: Recorder | None = None) -> None:
        """Make an empty cache.

        Args:
            limit: Number of recordings; the one whose last use is longest ago is dropped.
            recorder: By default a [`CudaRecorder`].

        Raises:
            ValueError: `limit` below 1.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        self.limit = limit
        self.recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self._recordings: collections.OrderedDict[Hashable, _Recording] = collections.OrderedDict()
        self._weights: dict[str, tuple[Any, ...]] = {}
        self._refused: set[Hashable] = set()
        self._said: set[tuple[str, str]] = set()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self._recordings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model start without recordings."""
        return GraphCache, (self.limit,)

    def run(
        self, name: str, modules: Iterable[nn.Module], key: Hashable, computation: Computation, inputs: Tensors
    ) -> Tensors | None:
        """Run a computation by its recording, which is made first if there is none.

        Args:
            name: Name of the computation, for messages.
            modules: The modules whose weights it reads.
            key: Everything that decides it besides shapes and types of the inputs.
            computation: Function from the inputs to the outputs; it must not keep or change either.
            inputs: Tensors on one device.

        Returns:
            The outputs, as copies of their own; `None` if the computation must be run without a recording, the reason
            of which is logged once.
        """
        modules = list(modules)
        device = next(iter(inputs.values())).device
        weights, reason = _walk(modules, device)
        reason = reason or self._reason(inputs, device)
        if reason is not None:
            self._refuse(name, reason)
            return None
        shapes = tuple((part, tuple(value.shape), value.dtype) for part, value in inputs.items())
        key = (name, key, shapes, device)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._weights.setdefault(name, weights) != weights:
                self.clear()
                self._weights[name] = weights
            if key in self._refused:
                return None
            recording = self._recordings.get(key)
            if recording is None:
                try:
                    recording = self._record(key, computation, inputs)
                except RuntimeError as error:
                    self._refused.add(key)
                    self._refuse(name, f"it cannot be recorded: {' '.join(str(error).split())}")
                    return None
            self._recordings.move_to_end(key)
            with self.recorder.turn(device):
                for part, value in inputs.items():
                    recording.inputs[part].copy_(value)
                recording.replay()
                return {part: value.clone() for part, value in recording.outputs.items()}

    def clear(self) -> None:
        """Drop all recordings."""
        self._recordings.clear()
        self._refused.clear()
        self._weights.clear()

    def _record(self, key: Hashable, computation: Computation, inputs: Tensors) -> _Recording:
        while len(self._recordings) >= self.limit:
            self._recordings.popitem(last=False)
        buffers = {part: value.clone() for part, value in inputs.items()}
        with used_constants() as constants:
            recording = _Recording(buffers, *self.recorder(computation, buffers), constants)
        self._recordings[key] = recording
        return recording

    def _reason(self, inputs: Tensors, device: torch.device) -> str | None:
        """Why a call cannot be run by a recording; `None` if it can."""
        if device.type != self.recorder.device_type or any(value.device != device for value in inputs.values()):
            return f"inputs are on {', '.join(sorted({str(value.device) for value in inputs.values()}))}"
        if torch.is_grad_enabled():
            return "gradients are recorded; call it under torch.no_grad()"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on; load the model in the wanted dtype"
        return None

    def _refuse(self, name: str, reason: str) -> None:
        if (name, reason) not in self._said:
            self._said.add((name, reason))
            logger.warning("The %s runs without a CUDA graph: %s.", name, reason)


def _walk(modules: list[nn.Module], device: torch.device) -> tuple[tuple[Any, ...], str | None]:
    """Where the weights of modules and of all that they contain are, and why they cannot be recorded."""
    parts: list[Any] = []
    while modules:
        module = modules.pop()
        state = module.__dict__
        if module.training:
            return (), "the model is in training mode; call model.eval()"
        if "_hf_hook" in state:
            return (), "accelerate moves its weights or inputs; load the model on one device"
        if any(not _is_stock(hook) for hooks in _HOOKS for hook in state[hooks].values()):
            return (), f"{type(module).__name__} has hooks"
        parts += (id(module), type(module), state.get("forward"))  # a patched instance has its own
        for values in (state["_parameters"], state["_buffers"]):
            for value in values.values():
                if value is None:
                    continue
                if type(value) not in (nn.Parameter, Tensor):
                    return (), f"{type(module).__name__} has quantised weights ({type(value).__name__})"
                if value.device != device:
                    return (), f"weights of {type(module).__name__} are on {value.device}"
                parts += (value.data_ptr(), value.dtype, value.shape)
        parts += [repr(state[name]) for name in _ADAPTER_STATE if name in state]
        modules.extend(child for child in state["_modules"].values() if child is not None)
    return tuple(parts), None


def _is_stock(hook: Any) -> bool:
    """Whether transformers put a hook there, which collects hidden states for calls that ask for them."""
    return getattr(hook, "__module__", "").startswith("transformers.")


__all__ = ["CudaRecorder", "GraphCache", "Recorder"]
