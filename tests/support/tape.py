"""A recorder of computations for CPUs that behaves as a CUDA graph does: the same operators on the same memory."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    """The tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Tape(TorchDispatchMode):
    """Notes operators with their arguments and results; refuses those that read a tensor."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
    MADE_ON_THE_HOST = ("lift_fresh", "lift_fresh_copy")

    def __init__(self):
        super().__init__()
        self.steps = []

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
        self.steps.append((func, args, kwargs, result))
        return result


class TapeRecorder:
    """Records on a CPU. A replay runs the noted operators again and writes their results where they were."""

    device_type = "cpu"

    def __init__(self):
        self.recorded = self.replayed = 0
        self.operators = []

    def turn(self, device):
        return contextlib.nullcontext()

    def __call__(self, computation, inputs):
        self.recorded += 1
        computation(inputs)  # the warm-up
        with _Tape() as tape:
            outputs = computation(inputs)
        steps = tape.steps
        self.operators.append(len(steps))
        for value in outputs.values():
            if value.is_floating_point():
                value.fill_(torch.nan)  # an output that a replay does not write shows

        def replay():
            self.replayed += 1
            for func, args, kwargs, results in steps:
                places = {argument.untyped_storage().data_ptr() for argument in tensors((args, kwargs))}
                again = func(*args, **kwargs)
                for old, new in zip(tensors(results), tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() not in places:
                        old.copy_(new)

        return replay, outputs
