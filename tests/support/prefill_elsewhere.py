"""Count what a prefill costs a device that need not exist: operators, and copies from the host.

`meta` stands for the device under `FakeTensorMode`: an operator on tensors of two devices raises as it does on a GPU,
and so does reading a tensor. The one read that a prefill makes is answered by numbers of a run on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from unittest import mock

import torch
from second_device import DEVICE
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reccomp_hf.core import front, tensors


class DeviceCosts(TorchDispatchMode):
    """Counts operators that run on the device, and copies from the host to it."""

    def __init__(self):
        super().__init__()
        self.operators, self.copies = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given, made = (devices(tree) for tree in ((args, kwargs), result))
        if name == "copy_":
            given, made = devices(args[1]), devices(args[0])
        if made == {DEVICE} and given == {"cpu"}:
            self.copies[name] += 1
        if DEVICE in made:
            self.operators[name] += 1
        return result


def devices(tree):
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


@contextlib.contextmanager
def constants_kept():
    """Constants are fake tensors, made on the host and copied at their first use, and kept as real ones are."""

    @functools.lru_cache
    def kept(device, make, types, *arguments):
        with unset_fake_temporarily():
            values = torch.as_tensor(make(*arguments))
        return torch.zeros(values.shape, dtype=values.dtype).to(device)

    with mock.patch.multiple(tensors, _is_traced=lambda like: False, _kept_constant=kept):
        yield


def costs_elsewhere(architecture, batch, fields, times=2):
    """Costs of each of several equal prefills, up to the language model, on the second device."""
    numbers, stock = [], front.ChosenPrompts.sync_and_validate

    def note(chosen, splice=None):
        read, given = chosen.pictures.read, []
        with mock.patch.object(chosen.pictures, "read", lambda values: (given.extend(values), read(values))):
            values = stock(chosen, splice)
        numbers[:] = [values, given]
        return values

    def answer(chosen, splice=None):
        if chosen.pictures.unread:
            chosen.pictures.read(numbers[1])
        return numbers[0]

    model = architecture.compressed()
    with torch.no_grad(), mock.patch.object(front.ChosenPrompts, "sync_and_validate", note):
        wanted = model.compress_inputs(**batch, token_recovery=fields)[0]["inputs_embeds"]
    known = mock.patch.object(torch, "is_autocast_enabled", lambda *kind: False)  # autocast has no device `meta`
    found = []
    with FakeTensorMode(), constants_kept(), known, torch.no_grad():
        with torch.device(DEVICE):
            elsewhere = architecture.model_class(model.config).eval()
        inputs = {name: torch.zeros(value.shape, dtype=value.dtype, device=DEVICE) for name, value in batch.items()}
        if "image_sizes" in batch:
            inputs["image_sizes"] = batch["image_sizes"].tolist()
        with mock.patch.object(front.ChosenPrompts, "sync_and_validate", answer):
            for _ in range(times):
                with DeviceCosts() as costs:
                    embeds = elsewhere.compress_inputs(**inputs, token_recovery=fields)[0]["inputs_embeds"]
                assert embeds.shape == wanted.shape and embeds.device.type == DEVICE
                found.append(costs)
    return found
