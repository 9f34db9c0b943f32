"""Recordings and weights that change: in place, by others in their place, by moves, by adapters.

See `GraphCache` for how each of it is seen.
"""

import pytest
import torch
from architectures import LLAVA, ROWS
from tape import TapeRecorder
from torch import nn

from reccomp_hf.core.graphs import GraphCache


@pytest.fixture
def model():
    """A model of one's own, with recordings."""
    model = LLAVA.build(budget=16)
    model._graphs = GraphCache(recorder=TapeRecorder())
    return model


@torch.no_grad()
def tokens_of(model, batch):
    return model(**batch, logits_to_keep=1).image_hidden_states


WEIGHT = "model.multi_modal_projector.linear_2.weight"
IN_PLACE = {
    "mul_": lambda model: model.get_parameter(WEIGHT).mul_(2),
    "copy_": lambda model: model.get_parameter(WEIGHT).copy_(2 * model.get_parameter(WEIGHT)),
    "data": lambda model: model.get_parameter(WEIGHT).data.mul_(2),
    "load_state_dict": lambda model: model.load_state_dict({WEIGHT: 2 * model.get_parameter(WEIGHT)}, strict=False),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_weights_that_change_in_place_are_seen(model, change):
    batch, recorder = LLAVA.encode(ROWS), model._graphs.recorder
    before = tokens_of(model, batch)
    with torch.no_grad():
        change(model)
    after = tokens_of(model, batch)
    assert recorder.recorded == 2 and not after.equal(before)
    model.use_cuda_graph(False)
    torch.testing.assert_close(after, tokens_of(model, batch))


def replace_a_weight(model):
    projection = model.model.multi_modal_projector.linear_2
    projection.weight = nn.Parameter(projection.weight * 2, requires_grad=False)


def replace_the_storage(model):
    weight = model.model.multi_modal_projector.linear_2.weight
    weight.data = weight.data * 2


def replace_all_fields(model):
    projection = model.model.multi_modal_projector.linear_2
    doubled = {name: nn.Parameter(2 * value, requires_grad=False) for name, value in projection.named_parameters()}
    projection.__dict__["_parameters"] = doubled


def load_other_weights(model):
    model.load_state_dict({WEIGHT: 2 * model.get_parameter(WEIGHT)}, strict=False, assign=True)


def to_another_dtype(model):
    model.bfloat16()


def replace_a_module(model):
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    projection = model.model.multi_modal_projector.linear_2
    doubled = Doubled(projection.in_features, projection.out_features).eval()
    doubled.weight, doubled.bias = projection.weight, projection.bias  # at the same place
    model.model.multi_modal_projector.linear_2 = doubled


def patch_a_forward(model):
    projection = model.model.multi_modal_projector.linear_2
    stock = projection.forward
    projection.forward = lambda states: 2 * stock(states)


def add_an_adapter(model):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(target_modules=["linear_2"], init_lora_weights=False), model)
    model.eval()


CHANGES = (
    *(replace_a_weight, replace_the_storage, replace_all_fields, load_other_weights, to_another_dtype),
    *(replace_a_module, patch_a_forward, add_an_adapter),
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_stands_elsewhere_is_recorded_anew(model, change):
    batch, recorder = LLAVA.encode(ROWS), model._graphs.recorder
    before = tokens_of(model, batch)
    change(model)
    after = tokens_of(model, batch)
    assert recorder.recorded > 2 and not after.equal(before)
    recordings = recorder.recorded
    assert tokens_of(model, batch).equal(after) and recorder.recorded == recordings
    model.use_cuda_graph(False)
    torch.testing.assert_close(after, tokens_of(model, batch))


def test_adapters_that_are_switched_scaled_or_merged_are_recorded_anew(model):
    add_an_adapter(model)
    batch, recorder = LLAVA.encode(ROWS), model._graphs.recorder
    layer, seen = model.model.multi_modal_projector.linear_2, [tokens_of(model, batch)]
    for change in (
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
        lambda: layer.scale_layer(3.0),
        lambda: layer.merge(),
    ):
        recordings = recorder.recorded
        change()
        seen.append(tokens_of(model, batch))
        assert recorder.recorded > recordings
    assert not seen[1].equal(seen[0]) and not seen[3].equal(seen[0])
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(seen[4], seen[3], rtol=1e-4, atol=1e-5)


def test_training_in_between_keeps_the_recordings(model):
    batch, recorder = LLAVA.encode(ROWS), model._graphs.recorder
    wanted = tokens_of(model, batch)
    model.train()
    tokens_of(model, batch)
    model.eval()
    assert tokens_of(model, batch).equal(wanted) and recorder.recorded == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 on 5.x
def test_adapters_of_peft_are_recorded_anew():
    """Added, switched, turned off, deleted and merged: both computations are recorded anew and equal eager ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = {"target_modules": r".*(linear_2|language_model.*q_proj)", "init_lora_weights": False}
    adapted = get_peft_model(LLAVA.build(budget=16), LoraConfig(**config), adapter_name="first")
    model, batch, seen = adapted.get_base_model(), LLAVA.encode(ROWS), []
    model._graphs = graphs = GraphCache(recorder=TapeRecorder())

    def logits():
        with torch.no_grad():
            return model(**batch, use_cache=True, logits_to_keep=1).logits

    for change in (
        lambda: None,
        lambda: adapted.add_adapter("second", LoraConfig(**config)),
        lambda: adapted.set_adapter("second"),
        lambda: adapted.base_model.disable_adapter_layers(),
        lambda: adapted.base_model.enable_adapter_layers(),
        lambda: adapted.delete_adapter("first"),
        lambda: adapted.merge_and_unload(),
    ):
        change()
        model.eval()
        recordings = graphs.recorded
        seen.append(logits())
        assert graphs.recorded == recordings + 2 and not graphs.refusals
        model._graphs = None
        torch.testing.assert_close(seen[-1], logits())
        model._graphs = graphs
    first, again, second, without, *others = seen
    assert again.equal(first)
    assert not any(torch.allclose(one, other) for one, other in ((first, second), (second, without), (first, without)))
    for other in others:
        torch.testing.assert_close(other, second, rtol=1e-4, atol=1e-5)
