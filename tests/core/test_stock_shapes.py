"""Hidden states, attentions and scores are as the stock model gives them, for whole and for shortened prompts."""

import pytest
import torch
from architectures import ARCHITECTURES, ROWS, each_architecture, generate, stock_inputs

WANTED = {"output_hidden_states": True, "output_attentions": True}
SETTINGS = {"off": {"enabled": False}, "whole": {"budget": 1.0}, "short": {"budget": 8}, "dynamic": {}}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def shapes(value):
    """Shapes in nested outputs of states."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else [shapes(part) for part in value]


@pytest.fixture(params=ARCHITECTURES, ids=lambda row: row.name)
def pair(request):
    """An architecture, our model and the stock one, both with an attention that gives its weights."""
    models = request.param.build(), request.param.stock()
    for model in models:
        model.set_attn_implementation("eager")
    return request.param, *models


def counterpart(model, batch, setting):
    """What the stock model is given for the same sequence."""
    if setting in (SETTINGS["off"], SETTINGS["whole"]):
        return stock_inputs(batch)
    short, _ = model.compress_inputs(**batch, token_recovery=setting)
    return {name: short[name] for name in ("inputs_embeds", "attention_mask", "position_ids") if name in short}


@torch.no_grad()
@each_setting
def test_states_of_a_forward_are_stock(pair, setting):
    architecture, model, stock = pair
    batch = architecture.encode(ROWS[:2])
    ours = model(**batch, **WANTED, token_recovery=setting)
    theirs = stock(**counterpart(model, batch, setting), **WANTED)
    for name in ("hidden_states", "attentions"):
        assert shapes(ours[name]) == shapes(theirs[name])
        assert all(map(torch.equal, ours[name], theirs[name]))
    blocks = model.config.get_text_config().num_hidden_layers
    assert (len(ours.hidden_states), len(ours.attentions)) == (blocks + 1, blocks)
    if getattr(theirs, "image_outputs", None) is not None:
        assert shapes(ours.image_outputs.pooler_output) == shapes(theirs.image_outputs.pooler_output)
    bare = model(**batch, token_recovery=setting)
    assert bare.hidden_states is None
    assert bare.attentions is None


@each_setting
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_states_of_generated_tokens_are_stock(pair, setting, options):
    architecture, model, stock = pair
    batch = architecture.encode(ROWS[::3])  # one image each: stock 4.57 repeats images, not rows of them
    wanted = {**WANTED, "output_scores": True, "output_logits": True, "return_dict_in_generate": True, **options}
    wanted |= {"min_new_tokens": 3, "new_tokens": 3}
    torch.manual_seed(0)
    ours = generate(model, batch, token_recovery=setting, **wanted)
    torch.manual_seed(0)
    theirs = generate(stock, counterpart(model, batch, setting), **wanted)
    assert shapes(ours.sequences) == (theirs.sequences.shape[0], batch["input_ids"].shape[1] + 3)
    assert torch.equal(ours.sequences[:, -3:], theirs.sequences[:, -3:])
    for name in ("hidden_states", "attentions", "scores", "logits"):
        assert shapes(ours[name]) == shapes(theirs[name]), name


@torch.no_grad()
@each_architecture
@each_setting
def test_image_features_are_stock(architecture, setting):
    batch = stock_inputs(architecture.encode(ROWS[:2]))
    pixels = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    features, expected = (
        model.get_image_features(**pixels) for model in (architecture.build(**setting), architecture.shared_stock())
    )
    features, expected = (getattr(value, "pooler_output", value) for value in (features, expected))
    assert len(features) == sum(images for _, images in ROWS[:2])
    assert all(map(torch.equal, features, expected))
