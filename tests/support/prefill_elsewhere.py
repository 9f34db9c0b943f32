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

from reccomp_hf.core import front, prefill, tensors
from reccomp_hf.core import graphs as graphs_module
from reccomp_hf.core.graphs import GraphCache


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
        if (
            made == {DEVICE}
            and given == {"cpu"}
            and any(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        ):
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

    with mock.patch.multiple(tensors, is_traced=lambda like: False, _kept_constant=kept):
        yield


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def model_elsewhere(architecture, batch, fields, dtype=torch.float32):
    """A model on the second device, its inputs, and embeddings of the shape that it should make of them.

    Reads are answered by the numbers of a run on the CPU.
    """
    numbers, stock = [], front.ChosenPrompts.sync_and_validate

    def note(chosen, splice=None):
        read, given = chosen.pictures.read, []
        with mock.patch.object(chosen.pictures, "read", lambda values: (given.extend(values), read(values))):
            values = stock(chosen, splice)
        numbers[:] = [values, given]
        return values

    def answer(chosen, splice=None):
        if unread := chosen.pictures.unread:  # the last ones, where a bound takes the place of the first ones
            chosen.pictures.read(numbers[1][-sum(map(len, unread)) :])
        return numbers[0]

    model = architecture.compressed()
    with torch.no_grad(), mock.patch.object(front.ChosenPrompts, "sync_and_validate", note):
        wanted = model.compress_inputs(**batch, token_recovery=fields)[0]["inputs_embeds"]
    # Autocast has no device `meta`.
    unknown = {"is_autocast_enabled": lambda *kind: False, "autocast": lambda *kind, **how: contextlib.nullcontext()}
    # `torch.tensor([])`, an empty cache of transformers, is not a fake tensor there.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, constants_kept(), mock.patch.multiple(torch, **unknown), torch.no_grad():
        with torch.device(DEVICE), default_dtype(dtype):
            elsewhere = architecture.model_class(model.config).eval()
        inputs = {name: torch.zeros(value.shape, dtype=value.dtype, device=DEVICE) for name, value in batch.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        if "image_sizes" in batch:
            inputs["image_sizes"] = batch["image_sizes"].tolist()
        with mock.patch.object(front.ChosenPrompts, "sync_and_validate", answer):
            yield elsewhere, inputs, wanted


def costs_elsewhere(architecture, batch, fields, times=2):
    """Costs of each of several equal prefills, up to the language model, on the second device."""
    found = []
    with model_elsewhere(architecture, batch, fields) as (model, inputs, wanted):
        for _ in range(times):
            with DeviceCosts() as costs:
                embeds = model.compress_inputs(**inputs, token_recovery=fields)[0]["inputs_embeds"]
            assert embeds.shape == wanted.shape and embeds.device.type == DEVICE
            found.append(costs)
    return found


def recorded_elsewhere(architecture, batch, fields, dtype=torch.float32):
    """Costs of every computation of a prefill that a GPU records, as it runs for the second time, by its name."""
    found = {}

    def run(graphs, name, modules, key, computation, inputs, take=None):
        assert {value.device.type for value in inputs.values()} == {DEVICE}, name
        try:
            computation(inputs)
            with DeviceCosts() as costs:
                outputs = computation(inputs)
        except RuntimeError as error:
            if "depends on the images" not in str(error):
                raise
            return None
        found[name] = costs
        assert {value.device.type for value in outputs.values()} == {DEVICE}, name
        return (take or graphs_module._copies)(outputs)

    with model_elsewhere(architecture, batch, fields, dtype) as (model, inputs, wanted):
        model.use_cuda_graph()
        with mock.patch.object(GraphCache, "run", run), mock.patch.object(prefill, "MOST_TOKENS", 10**6):
            output = model(**inputs, token_recovery=fields, logits_to_keep=1)
        assert output.logits.shape[:2] == (len(wanted), 1) and output.logits.dtype == dtype
    return found
