"""CUDA graphs of a model's computations: recorded at the first call of a shape, replayed at the next ones."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import operator
import threading
import weakref
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
_PATCHES = ("forward", "_hf_hook")  # of an instance
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_FIELDS = operator.itemgetter(*_TENSORS, "_modules", *_HOOKS, "training")


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
    """Records CUDA graphs, all of which share one memory pool and are recorded on one stream."""

    device_type = "cuda"

    def __init__(self) -> None:
        """Leave pool and streams to the first recording."""
        self._pool: Any = None
        self._streams: dict[torch.device, Any] = {}
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
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
            before = torch.cuda.current_stream()
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream()
            stream = self._streams[device]
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    computation(inputs)
            before.wait_stream(stream)
            # A pool without a graph is not used again, nor one in which a capture failed: torch refuses both.
            pool = self._pool if self._graphs and self._pool is not None else torch.cuda.graph_pool_handle()
            self._pool, graph = None, torch.cuda.CUDAGraph()
            # A graph writes to the workspace that a matrix product had when it was recorded, and torch's compiler
            # frees the workspaces of all streams. Those made while a graph is recorded lie in its own pool.
            _free_workspaces()
            try:
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = computation(inputs)
            finally:
                torch.cuda.set_stream(before)  # torch leaves its own stream current if a capture fails
                _free_workspaces()
            self._pool = pool
            self._graphs.add(graph)
        return graph.replay, outputs


def _free_workspaces() -> None:
    """Free the memory that cuBLAS keeps for matrix products; the next product that needs some allocates it."""
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if free is not None:
        free()


@dataclasses.dataclass
class _Recording:
    inputs: Tensors
    replay: Callable[[], None]
    outputs: Tensors
    constants: list[Tensor]
    computation: Computation  # keeps alive what it refers to, whose memory the recording reads


class GraphCache:
    """The recordings of one model's computations.

    A recording belongs to a key, to the shapes and types of its inputs, and to the weights, which it reads where they
    are in memory. What happens to weights is seen like this:

    - Values that change in place (`copy_`, `.data.mul_`, an optimiser, `load_state_dict`) are what the next run reads.
    - Before every run the modules are walked: parameters and buffers with their addresses, hooks, classes, `forward`
      of an instance, PEFT's active, disabled, merged and scaled adapters. Where any of it changed (`.to`, `.half`,
      `load_state_dict(assign=True)`, a parameter or module put in the place of another one, an adapter loaded,
      switched, scaled, merged or removed), all recordings are dropped, and the new ones read the new weights.
    - Training mode, hooks, quantised weights, weights on another device are refused, as long as they last.
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
        self._watched: dict[str, _Watched] = {}
        self._states: dict[str, tuple[Any, ...]] = {}
        self._refused: set[Hashable] = set()
        self._said: set[tuple[str, str]] = set()
        self.recorded = 0  # recordings made so far, dropped ones included
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self._recordings)

    @property
    def refusals(self) -> list[str]:
        """Computations that were run without a recording so far, each with the reason."""
        return sorted(f"{name}: {reason}" for name, reason in self._said)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model start without recordings."""
        return GraphCache, (self.limit,)

    def run(
        self,
        name: str,
        modules: Iterable[nn.Module],
        key: Hashable,
        computation: Computation,
        inputs: Tensors,
        take: Callable[[Tensors], Any] | None = None,
    ) -> Any:
        """Run a computation by its recording, which is made first if there is none.

        Args:
            name: Name of the computation, for messages.
            modules: The modules whose weights it reads.
            key: Everything that decides it besides shapes and types of the inputs.
            computation: Function from the inputs to the outputs; it must not keep or change either.
            inputs: Tensors on one device.
            take: Function of the outputs, which the next run overwrites; it returns nothing that shares their memory.
                `None` copies each.

        Returns:
            The result of `take`; `None` if the computation must be run without a recording, the reason of which is
            logged once.
        """
        modules = list(modules)
        device = next(iter(inputs.values())).device
        watched = self._watched.get(name)
        if watched is None or not all(map(operator.is_, watched.roots, modules)):
            watched = _Watched(modules)
        state = watched.state(), device
        reason = self._reason(inputs, device)
        if reason is None and self._states.get(name) != state:
            reason = _reason_against(modules, device)
        if reason is not None:
            self._refuse(name, reason)
            return None
        shapes = tuple((part, tuple(value.shape), value.dtype) for part, value in inputs.items())
        key = (name, key, shapes, device)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._states.setdefault(name, state) != state:
                self.clear()
                watched = _Watched(modules)
                self._states[name] = watched.state(), device
            self._watched[name] = watched
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
                return (take or _copies)(recording.outputs)

    def clear(self) -> None:
        """Drop all recordings."""
        self._recordings.clear()
        self._refused.clear()
        self._states.clear()
        self._watched.clear()

    def _record(self, key: Hashable, computation: Computation, inputs: Tensors) -> _Recording:
        while len(self._recordings) >= self.limit:
            self._recordings.popitem(last=False)
        buffers = {part: value.clone() for part, value in inputs.items()}
        with used_constants() as constants:
            recording = _Recording(buffers, *self.recorder(computation, buffers), constants, computation)
        self._recordings[key] = recording
        self.recorded += 1
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


def _copies(outputs: Tensors) -> Tensors:
    return {part: value.clone() for part, value in outputs.items()}


class _Watched:
    """Modules and all that they contain, in a list: a walk before every run would take longer than what it checks."""

    def __init__(self, roots: list[nn.Module]) -> None:
        """Walk the modules."""
        self.roots = roots
        self._modules = [part for root in roots for part in _parts_of(root)]
        self._dicts = [module.__dict__ for module in self._modules]
        self._fields = [*map(_FIELDS, self._dicts)]
        tensors, others = len(_TENSORS), len(_TENSORS) + len(_HOOKS) + 1
        self._tensors = [values for fields in self._fields for values in fields[:tensors]]
        self._others = [values for fields in self._fields for values in fields[tensors:others]]
        self._adapted = [own for own in self._dicts if "_active_adapter" in own]

    def state(self) -> Any:
        """Everything about the modules that a recording takes for granted besides values.

        It is compared before every run, so it is kept cheap: identities and addresses, by functions without a loop.
        """
        dicts = self._dicts
        try:
            is_unchanged = [*map(_FIELDS, dicts)] == self._fields
        except RuntimeError:  # two tensors were compared: one was put into the place of the other
            is_unchanged = False
        if not is_unchanged:
            return object()  # equal to nothing; the modules are walked again
        entries = itertools.chain.from_iterable(map(dict.values, self._tensors))
        values = [value for value in entries if value is not None]
        return (
            [*map(type, self._modules)],
            [*map(id, itertools.chain.from_iterable(map(dict.values, self._others)))],
            [*map(id, values)],
            [*map(Tensor.data_ptr, values)],
            [[*map(dict.get, dicts, itertools.repeat(name))] for name in _PATCHES],
            [repr(own.get(name)) for own in self._adapted for name in _ADAPTER_STATE],
        )


def _reason_against(modules: list[nn.Module], device: torch.device) -> str | None:
    """Why computations of modules, and of all that they contain, cannot be recorded; `None` if they can."""
    for module in (part for root in modules for part in _parts_of(root)):
        state, name = module.__dict__, type(module).__name__
        if module.training:
            return "the model is in training mode; call model.eval()"
        if "_hf_hook" in state:
            return "accelerate moves its weights or inputs; load the model on one device"
        if any(not _is_stock(hook) for hooks in _HOOKS for hook in state[hooks].values()):
            return f"{name} has hooks"
        for value in (*state["_parameters"].values(), *state["_buffers"].values()):
            if value is None:
                continue
            if type(value) not in (nn.Parameter, Tensor):
                return f"{name} has quantised weights ({type(value).__name__})"
            if value.device != device:
                return f"weights of {name} are on {value.device}"
    return None


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all that it contains; `named_modules` leaves out CLIP's text side."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _parts_of(child)


def _is_stock(hook: Any) -> bool:
    """Whether this code or transformers, which collects hidden states for some calls, put a hook there."""
    return getattr(hook, "__module__", "").startswith(("transformers.", f"{__name__.rpartition('.')[0]}."))


__all__ = ["CudaRecorder", "GraphCache", "Recorder"]
