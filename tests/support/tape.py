"""A recorder of computations for CPUs that behaves as a CUDA graph does: the same operators on the same memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def tensors(tree):
    """The tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Tape(TorchDispatchMode):
    """Notes operators with their arguments and results; refuses those that read a tensor.

    Of a tensor that the recorded part did not make it keeps no more than a CUDA graph does, which keeps an address.
    """

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
    MADE_ON_THE_HOST = ("lift_fresh", "lift_fresh_copy")

    def __init__(self):
        super().__init__()
        self.steps, self.made, self.places = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.READS or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if name in self.MADE_ON_THE_HOST and args[0].numel():
            raise RuntimeError("a copy from the host is not permitted when stream is capturing")
        result = func(*args, **kwargs)
        self.steps.append((func, *tree_map_only(Tensor, self._address, (args, kwargs)), result))
        self.made |= {id(tensor): tensor for tensor in tensors(result)}
        return result

    def _address(self, tensor):
        if id(tensor) in self.made or not tensor.ndim:  # numbers are arguments of a kernel
            return lambda: tensor
        self.places.add(place(tensor))
        return weakref.ref(tensor)

    def intermediates(self):
        """Floating tensors whose memory is the recorded part's own."""
        return [
            tensor
            for tensor in self.made.values()
            if tensor.is_floating_point() and tensor.numel() and place(tensor) not in self.places
        ]


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def at_address(address):
    tensor = address()
    if tensor is None:
        raise RuntimeError("a recording reads memory that has been freed")
    return tensor


class TapeRecorder:
    """Records on a CPU. A replay runs the noted operators again and writes their results where they were.

    All recordings share their memory, as in one pool: after a replay nothing is left of what the others computed.
    """

    device_type = "cpu"

    def __init__(self):
        self.recorded = self.replayed = 0
        self.operators, self.intermediates = [], []

    def turn(self, device):
        return contextlib.nullcontext()

    def __call__(self, computation, inputs):
        self.recorded += 1
        computation(inputs)  # the warm-up
        with _Tape() as tape:
            outputs = computation(inputs)
        tape.places |= {place(value) for value in inputs.values()}
        steps, own = tape.steps, tape.intermediates()
        self.operators.append(len(steps))
        self.intermediates += own
        for value in own:
            value.fill_(torch.nan)  # an output that a replay does not write shows

        def replay():
            self.replayed += 1
            for value in self.intermediates:
                value.fill_(torch.nan)
            for func, args, kwargs, results in steps:
                args, kwargs = tree_map_only(Callable, at_address, (args, kwargs))
                places = {place(argument) for argument in tensors((args, kwargs))}
                again = func(*args, **kwargs)
                for old, new in zip(tensors(results), tensors(again), strict=True):
                    if place(old) not in places:
                        old.copy_(new)

        return replay, outputs
