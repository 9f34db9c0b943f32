"""Promises of every compressed model about its forward pass, for every architecture, setting and kind of batch."""

import pytest
import tiny
import torch
from architectures import (
    ARCHITECTURES,
    CACHE,
    METHODS,
    MODEL_SETTINGS,
    ROWS,
    assert_clear_choices,
    assert_same_records,
    each_architecture,
    each_setting,
    generate,
    labels_of,
    single_runs,
)
from host_reads import HostReads
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, DynamicCache

from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.methods.registry import get_method, reads_encoded_question
from reccomp_hf.core.splicing import counted_positions

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PICTURES = sum(images for _, images in ROWS)
# No method is told the side of the padding: text encoder, positions and splicing are. Every setting of theirs is here.
RIGHT = ("paper", "spread", "visual", "penultimate", "method authors", "method pooling")
each_setting_and_side = pytest.mark.parametrize(
    ("setting", "side"),
    [
        pytest.param(MODEL_SETTINGS[name], side, id=f"{side}-{name}")
        for side, names in (("left", MODEL_SETTINGS), ("right", RIGHT))
        for name in names
    ],
)


def stock_logits(architecture, short):
    """Logits of the stock language model over what `compress_inputs` returned."""
    stock = architecture.shared_stock()
    names = ("inputs_embeds", "attention_mask", "position_ids")
    states = stock.model.language_model(**{name: short[name] for name in names if name in short}).last_hidden_state
    return stock.lm_head(states)


def shifted_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@each_architecture
@each_setting
def test_no_choice_depends_on_a_near_tie(architecture, setting):
    assert_clear_choices(architecture.compressed(), architecture.encode(), setting)


def compressed(model, batch, setting):
    """The short batch of `compress_inputs`, with labels and positions."""
    positions = counted_positions(batch["attention_mask"])
    labels = labels_of(model, batch)
    return model.compress_inputs(**batch, labels=labels, position_ids=positions, token_recovery=setting)[0]


@torch.no_grad()
@each_architecture
@each_setting
def test_every_stage_of_a_setting_chooses_tokens(architecture, setting):
    records = architecture.compressed().recover(**architecture.encode(), token_recovery=setting)
    assert len(records) == PICTURES
    masks = METHODS[setting["method"]][1] if "method" in setting else ("visual", "text")
    if setting.get("text_share") == 0:
        masks = ("visual",)
    for name in masks:
        assert all(getattr(record, f"{name}_mask").any() for record in records), name
    if "budget" not in setting:
        assert len({int(record.counts.sum()) for record in records}) > 1


def test_the_batch_has_a_question_of_several_windows():
    assert all(row.encode()["recovery_input_ids"].shape[1] > 1 for row in ARCHITECTURES)


@torch.no_grad()
@each_architecture
@each_setting_and_side
def test_the_records_of_a_row_are_those_of_its_single_run(architecture, setting, side):
    model = architecture.compressed()
    records = model.recover(**architecture.encode(side=side), token_recovery=setting)
    singles = [batch for batch in single_runs(architecture) if "pixel_values" in batch]
    alone = [record for batch in singles for record in model.recover(**batch, token_recovery=setting)]
    assert_same_records(records, alone)


@torch.no_grad()
@each_architecture
@each_setting_and_side
def test_the_compressed_row_of_a_batch_is_its_single_run(architecture, setting, side):
    model = architecture.compressed()
    short = compressed(model, architecture.encode(side=side), setting)
    for row, single in enumerate(single_runs(architecture)):
        inside, alone = short["attention_mask"][row].bool(), compressed(model, single, setting)
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(short[name][row, inside], alone[name][0]), name
        embeds = alone.get("inputs_embeds", model.get_input_embeddings()(alone["input_ids"]))
        torch.testing.assert_close(short["inputs_embeds"][row, inside], embeds[0], **CLOSE)


@torch.no_grad()
@each_architecture
@each_setting_and_side
def test_as_many_placeholders_stay_as_there_are_features(architecture, setting, side):
    model, batch = architecture.compressed(), architecture.encode(side=side)
    short, record = model.compress_inputs(**batch, token_recovery=setting)
    output = model(**batch, token_recovery=setting)
    placeholders = short["input_ids"] == model.config.image_token_id
    features = int((output.visual_token_counts + output.newline_counts).sum())
    assert int(placeholders.sum()) == len(output.image_hidden_states) == features
    assert int(output.visual_token_counts.sum()) == int(record.counts.sum())
    assert torch.equal(short["inputs_embeds"][placeholders], output.image_hidden_states)
    assert output.image_hidden_states.shape[1] == model.config.get_text_config().hidden_size


@torch.no_grad()
@each_architecture
@each_setting_and_side
def test_everything_but_placeholders_stays(architecture, setting, side):
    """Row by row: the same text and labels in the same order, padded on the same side, without longer padding."""
    model, batch = architecture.compressed(), architecture.encode(side=side)
    labels, image = labels_of(model, batch), model.config.image_token_id
    short, _ = model.compress_inputs(**batch, labels=labels, token_recovery=setting)
    lengths = short["attention_mask"].sum(-1)
    for row, mask in enumerate(short["attention_mask"]):
        attended, inside = batch["attention_mask"][row].bool(), mask.bool()
        text_before = attended & (batch["input_ids"][row] != image)
        text_after = inside & (short["input_ids"][row] != image)
        assert torch.equal(batch["input_ids"][row][text_before], short["input_ids"][row][text_after])
        assert torch.equal(labels[row][text_before], short["labels"][row][text_after])
        assert (short["labels"][row][~text_after] == -100).all()
        assert not (short["input_ids"][row][~inside] == image).any()
        padding = (len(mask) - int(lengths[row])) * [0]
        ones = int(lengths[row]) * [1]
        assert mask.tolist() == (padding + ones if side == "left" else ones + padding)
    assert lengths.max() == short["input_ids"].shape[1]


@torch.no_grad()
@each_architecture
@each_setting_and_side
def test_loss_and_logits_are_of_the_shortened_sequence(architecture, setting, side):
    model, batch = architecture.compressed(), architecture.encode(side=side)
    labels = labels_of(model, batch)
    short, _ = model.compress_inputs(**batch, labels=labels, token_recovery=setting)
    output = model(**batch, labels=labels, token_recovery=setting)
    assert output.logits.shape[:2] == short["input_ids"].shape
    assert output.logits.shape[1] < batch["input_ids"].shape[1]
    expected, inside = stock_logits(architecture, short), short["attention_mask"].bool()
    torch.testing.assert_close(output.logits[inside], expected[inside], **CLOSE)
    torch.testing.assert_close(output.loss, shifted_loss(expected, short["labels"]), **CLOSE)
    again = model(**short)
    assert torch.equal(again.logits, output.logits)
    assert torch.equal(again.loss, output.loss)
    as_tuple = model(**batch, labels=labels, token_recovery=setting, return_dict=False)
    assert torch.equal(as_tuple[1], output.logits)
    last = model(**batch, token_recovery=setting, logits_to_keep=1).logits
    for row in batch["attention_mask"][:, -1].nonzero().flatten():
        torch.testing.assert_close(last[row, 0], output.logits[row, inside[row]][-1], **CLOSE)


@each_architecture
def test_settings_of_the_config_act_as_settings_of_a_call(architecture):
    batch = architecture.encode()
    for setting in (MODEL_SETTINGS["spread"], MODEL_SETTINGS["method authors"]):
        model = architecture.build(**setting)
        with torch.no_grad():
            called = architecture.compressed()(**batch, token_recovery=setting).logits
            assert torch.equal(model(**batch).logits, called)
    model.config.token_recovery = {"method": "recoverable", "budget": 5}
    assert model(**batch).visual_token_counts.tolist() == [5] * PICTURES
    assert model(**batch, token_recovery={"budget": 7}).visual_token_counts.tolist() == [7] * PICTURES
    assert model.config.token_recovery.budget == 5


@torch.no_grad()
@each_architecture
def test_without_pictures_nothing_is_compressed(architecture):
    model, batch = architecture.compressed(), architecture.encode([("Say hello.", 0), ("Say goodbye now.", 0)])
    short, record = model.compress_inputs(**batch)
    assert record is None
    assert torch.equal(short["input_ids"], batch["input_ids"])
    names = ("input_ids", "attention_mask")
    stock = architecture.shared_stock()(**{name: batch[name] for name in names}).logits
    assert torch.equal(model(**batch).logits, stock)
    assert torch.equal(generate(model, batch)[:, : batch["input_ids"].shape[1]], batch["input_ids"])


@torch.no_grad()
@each_architecture
def test_decoding_continues_from_a_cache_of_the_short_prompt(architecture):
    model, batch, cache = architecture.compressed(), architecture.encode(), DynamicCache()
    short, _ = model.compress_inputs(**batch)
    model(**batch, **{CACHE: cache}, use_cache=True)
    new = batch["input_ids"][:, -5:]
    mask = torch.cat([short["attention_mask"], torch.ones_like(new)], dim=1)
    read_on = model(input_ids=new, attention_mask=mask, **{CACHE: cache}).logits
    embeds = torch.cat([short["inputs_embeds"], model.get_input_embeddings()(new)], dim=1)
    at_once = model(inputs_embeds=embeds, attention_mask=mask).logits[:, -5:]
    torch.testing.assert_close(read_on, at_once, **CLOSE)


@torch.no_grad()
@each_architecture
def test_the_model_without_head_gives_the_same_states(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    headless = architecture.base_class(model.config).eval()
    weights = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    headless.load_state_dict({name: value for name, value in weights.items() if not name.startswith("lm_head")})
    output, with_head = headless(**batch), model(**batch, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, with_head.hidden_states[-1], **CLOSE)
    assert torch.equal(output.visual_token_counts, with_head.visual_token_counts)
    torch.testing.assert_close(output.image_hidden_states, with_head.image_hidden_states, **CLOSE)


@each_architecture
def test_recovery_modules_are_frozen_and_named_as_in_clip(architecture):
    model = architecture.model_class(architecture.build().config)
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**architecture.text_config()))
    wanted = {f"token_recovery.text_encoder.{name}" for name in encoder.state_dict()}
    wanted.add("token_recovery.visual_projection.weight")
    assert {name for name in model.state_dict() if "token_recovery" in name} == wanted
    ours = {name: value for name, value in model.named_parameters() if "token_recovery" in name}
    assert wanted - ours.keys() <= {"token_recovery.text_encoder.text_model.embeddings.position_ids"}
    assert not any(parameter.requires_grad for parameter in ours.values())
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    assert all(parameter.requires_grad for parameter in model.model.multi_modal_projector.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.state_dict().values())


def test_host_reads_are_counted(monkeypatch):
    values = torch.tensor([1, 2])
    with HostReads(monkeypatch) as reads:
        for read in (
            lambda: values.tolist(),
            lambda: values.sum().item(),
            lambda: bool(values.any()),
            lambda: values.nonzero(),
            lambda: values[values > 1],
            lambda: values.repeat_interleave(values),
        ):
            before = len(reads.seen)
            read()
            assert len(reads.seen) == before + 1


@torch.no_grad()
@each_architecture
@each_setting
def test_the_device_is_read_as_often_as_needed(architecture, setting, monkeypatch):
    model, batch = architecture.compressed(), architecture.encode()
    with HostReads(monkeypatch) as reads:
        model.compress_inputs(**batch, token_recovery=setting)
    assert len(reads.seen) == architecture.host_reads, reads.seen


@torch.no_grad()
@each_architecture
@each_setting
@pytest.mark.parametrize("run", ["forward", "generate"])
def test_vision_tower_and_projector_run_once(architecture, setting, run):
    """Every block of the tower, but for the last one where only a text relevance of "last" reads what it gives.

    A method that chooses by projected features has the projector run on all patches before.
    """
    model, batch, calls = architecture.compressed(), architecture.encode(), []
    tower, projector = clip_vision_model(model.model.vision_tower), model.model.multi_modal_projector
    section = model.config.token_recovery.replace(setting)
    blocks = list(tower.encoder.layers)
    reads_last = section.text_relevance == "last" and reads_encoded_question(section)
    before = [projector] if get_method(section.method).reads_projected else []
    parts = [tower.embeddings, *(blocks if reads_last else blocks[:-1]), *before, projector]
    hooks = [
        part.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
        for part in (tower.embeddings, *blocks, projector)
    ]
    try:
        counts = model(**batch, token_recovery=setting).visual_token_counts
        if run == "generate":
            calls.clear()
            generate(model, batch, token_recovery=setting)
    finally:
        for hook in hooks:
            hook.remove()
    assert [module for module, _ in calls] == parts
    assert calls[-1][1][0].shape[:-1].numel() == int(counts.sum())
    if before:
        assert calls[-2][1][0].shape[:-1].numel() == len(calls[0][1][0]) * tiny.PATCHES


@torch.no_grad()
@each_architecture
@each_setting
def test_encoded_pictures_stand_for_pixels(architecture, setting):
    model, batch = architecture.compressed(), architecture.encode()
    seen = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_sizes")}
    encoded = model.encode_images(batch["pixel_values"], batch.get("image_sizes"), token_recovery=setting)
    ours = model(**seen, pixel_values=encoded, token_recovery=setting)
    assert ours.logits.equal(model(**batch, token_recovery=setting).logits)
    records = model.recover(**seen, pixel_values=encoded, token_recovery=setting)
    assert_same_records(records, model.recover(**batch, token_recovery=setting))


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("setting", RIGHT)
def test_encoded_pictures_generate_as_pixels_do(architecture, setting):
    model, batch, setting = architecture.compressed(), architecture.encode(), MODEL_SETTINGS[setting]
    expected = generate(model, batch, token_recovery=setting)
    sizes = batch.pop("image_sizes", None)
    batch["pixel_values"] = model.encode_images(batch["pixel_values"], sizes, token_recovery=setting)
    assert generate(model, batch, token_recovery=setting).equal(expected)


@torch.no_grad()
@each_architecture
def test_pictures_encoded_for_other_settings_are_refused(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    sizes = batch.pop("image_sizes", None)
    other = {"text_relevance": "value"}
    batch["pixel_values"] = model.encode_images(batch["pixel_values"], sizes, token_recovery=other)
    with pytest.raises(ValueError, match=r"encoded for other settings: hidden states \[\d+\] are missing"):
        model(**batch)
    for call in (model, model.generate, model.compress_inputs):
        with pytest.raises(ValueError, match="reads pixel_values as a tensor, but got EncodedImages"):
            call(**batch, token_recovery={"enabled": False})
    with pytest.raises(ValueError, match="the stock model reads pixel_values: pass them to it"):
        model.encode_images(torch.zeros(1), token_recovery={"enabled": False})
