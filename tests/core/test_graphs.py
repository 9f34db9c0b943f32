"""CUDA graphs without a GPU: a recorder for CPUs repeats the recorded operators on the recorded memory, as graphs do.

What the recordings are kept by, when they are dropped, what is refused and why, with real models.
"""

import contextlib
import copy
import gc
import logging
import pickle
import re
import weakref

import pytest
import torch
from architectures import LLAVA, MODEL_SETTINGS, ROWS, each_architecture, generate
from fixed_budgets import BALANCED, FIXED, KNOWN, each_budget
from tape import TapeRecorder
from torch import nn

from reccomp_hf.core import prefill
from reccomp_hf.core.graphs import CudaRecorder, GraphCache
from reccomp_hf.core.prefill import additive_mask
from reccomp_hf.core.tensors import _kept_constant, used_constants


def recorded(model, **options):
    """Switch recordings on, with the recorder for CPUs."""
    recorder = TapeRecorder()
    model._graphs = GraphCache(recorder=recorder, **options)
    return recorder


@pytest.fixture
def model():
    """A model of one's own, with recordings."""
    model = LLAVA.build(budget=16)
    recorded(model)
    return model


@torch.no_grad()
def tokens_of(model, batch, **fields):
    return model(**batch, token_recovery=fields, logits_to_keep=1).image_hidden_states


# ---- real models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "side"),
    [*((fields, "left") for fields in FIXED.values()), (BALANCED, "right")],
    ids=[*(f"{name}-left" for name in FIXED), "balanced-right"],
)
@each_architecture
def test_answers_are_those_without_recordings(architecture, fields, side):
    model = copy.deepcopy(architecture.compressed())
    batches = [architecture.encode(ROWS[:2], side, first) for first in (0, 3)]
    wanted = [generate(model, batch, token_recovery=fields) for batch in batches]
    assert not wanted[0].equal(wanted[1])
    recorder = recorded(model)
    for batch, ids in [*zip(batches, wanted, strict=True)] * 2:
        assert generate(model, batch, token_recovery=fields).equal(ids)
    # Two calls for each of two batches, of which the front is recorded once, and the prefill once for each length.
    assert recorder.replayed == 8 and 2 <= recorder.recorded <= 3
    assert {key[0] for key in model._graphs._recordings} == {"front", "language model"}


@each_budget
@each_architecture
def test_outputs_are_those_without_recordings(architecture, fields):
    model, batch = copy.deepcopy(architecture.compressed()), architecture.encode(ROWS)
    with torch.no_grad():
        short, record = model.compress_inputs(**batch, token_recovery=fields)
        output = model(**batch, token_recovery=fields, logits_to_keep=1)
        recorded(model)
        for _ in range(2):
            again, record_again = model.compress_inputs(**batch, token_recovery=fields)
            for name, value in short.items():
                torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5, msg=name)
            assert record_again.counts.equal(record.counts) and record_again.cluster.equal(record.cluster)
            found = model(**batch, token_recovery=fields, logits_to_keep=1)
            torch.testing.assert_close(found.logits, output.logits)
            torch.testing.assert_close(found.image_hidden_states, output.image_hidden_states)
            assert found.visual_token_counts.equal(output.visual_token_counts)
            assert found.newline_counts.equal(output.newline_counts)


@each_architecture
def test_encoded_images_are_recorded_too(architecture):
    model, batch = copy.deepcopy(architecture.compressed()), architecture.encode(ROWS)
    wanted, recorder = generate(model, batch, token_recovery=BALANCED), recorded(model)
    sizes = batch.pop("image_sizes", None)
    pixels = batch.pop("pixel_values")
    for _ in range(2):
        with torch.no_grad():
            images = model.encode_images(pixels, sizes, token_recovery=BALANCED)
        assert generate(model, {**batch, "pixel_values": images}, token_recovery=BALANCED).equal(wanted)
    assert (recorder.recorded, recorder.replayed) == (3, 6)  # the tower, the rest of the front, the prefill


def test_results_of_a_call_stay_when_another_follows(model):
    first, second = (LLAVA.encode(ROWS, first=first) for first in (0, 3))
    kept = tokens_of(model, first)
    values = kept.clone()
    assert not tokens_of(model, second).equal(values)
    assert kept.equal(values)


def test_results_may_be_used_in_training_later(model):
    with torch.inference_mode():
        tokens = model(**LLAVA.encode(ROWS), logits_to_keep=1).image_hidden_states
    assert not tokens.is_inference()
    assert tokens_of(model, LLAVA.encode(ROWS)).equal(tokens)


# ---- refusals ------------------------------------------------------------------------------------------------------


def hooked(model):
    model.model.vision_tower.register_forward_hook(lambda *_: None)


def training(model):
    model.train()


def moved_by_accelerate(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.multi_modal_projector, AlignDevicesHook("cpu"))


def on_two_devices(model):
    projection = model.model.multi_modal_projector.linear_2
    projection.register_buffer("elsewhere", torch.zeros(1, device="meta"))


def quantised(model):
    class Packed(nn.Parameter):
        """A weight as quantisers make them."""

    projection = model.model.multi_modal_projector.linear_2
    projection.weight = Packed(projection.weight.data, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "has hooks"),
        (training, "training mode; call model.eval()"),
        (moved_by_accelerate, "accelerate moves its weights or inputs"),
        (on_two_devices, "weights of Linear are on meta"),
        (quantised, r"quantised weights \(Packed\)"),
    ],
)
def test_models_that_cannot_be_recorded_run_without_and_say_why_once(model, change, reason, caplog):
    batch, recorder = LLAVA.encode(ROWS), model._graphs.recorder
    change(model)
    with caplog.at_level(logging.WARNING):
        found = [tokens_of(model, batch) for _ in range(2)]
    assert "front" not in [key[0] for key in model._graphs._recordings] and not caplog.text.count("Traceback")
    said = [record.message for record in caplog.records if "The front runs without a CUDA graph" in record.message]
    assert len(said) == 1
    torch.testing.assert_close(found[0], found[1])
    assert re.search(reason, said[0])
    assert recorder.recorded <= 1  # the language model, where it is not concerned


def test_calls_that_cannot_be_recorded_run_without_and_say_why_once(model, caplog):
    batch = LLAVA.encode(ROWS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(**batch, logits_to_keep=1)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                model(**batch, logits_to_keep=1)
            generate(model, batch, token_recovery={"budget": None})
    fronts = [record.message for record in caplog.records if "front" in record.message]
    assert [message.partition(": ")[2].split(";")[0] for message in fronts] == [
        "gradients are recorded",
        "autocast is on",
        "it cannot be recorded: the number of tokens depends on the images.",
    ]


def test_another_device_is_refused(model, caplog):
    model.use_cuda_graph()
    assert isinstance(model._graphs.recorder, CudaRecorder)
    with caplog.at_level(logging.WARNING):
        wanted = tokens_of(model, LLAVA.encode(ROWS))
    assert "The front runs without a CUDA graph: inputs are on cpu." in caplog.text
    model.use_cuda_graph(False)
    assert model._graphs is None and tokens_of(model, LLAVA.encode(ROWS)).equal(wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"use_cache": False},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=str,
)
def test_generation_options_are_those_without_recordings(model, options):
    batch = LLAVA.encode(ROWS[:1])
    found = [model.generate(**batch, max_new_tokens=5, do_sample=False, **options) for _ in range(2)]
    model.use_cuda_graph(False)
    wanted = model.generate(**batch, max_new_tokens=5, do_sample=False, **options)
    for ids in found:
        assert getattr(ids, "sequences", ids).equal(getattr(wanted, "sequences", wanted))


def test_long_prefills_are_not_recorded(model, monkeypatch):
    recorder = model._graphs.recorder
    monkeypatch.setattr(prefill, "MOST_TOKENS", 100)
    tokens_of(model, LLAVA.encode(ROWS))
    assert recorder.recorded == 1  # the front


def test_loss_is_that_without_recordings(model):
    batch = LLAVA.encode(ROWS)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
    model.use_cuda_graph(False)
    torch.testing.assert_close(loss, model(**batch, labels=labels).loss)


# ---- copies, masks, methods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_start_without_recordings(copied):
    model = LLAVA.build(budget=16)
    model.use_cuda_graph(limit=5)
    other = copied(model)
    assert (other._graphs.limit, len(other._graphs)) == (5, 0) and other._graphs is not model._graphs


def test_a_limit_below_one_is_refused(model):
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        model.use_cuda_graph(limit=0)


@pytest.mark.parametrize("missing", [0, 3])
def test_masks_of_every_form_are_one(missing):
    embeds = torch.zeros(2, 5, 4)
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    square = torch.ones(5, 5, dtype=torch.bool).tril() & padded[:, None, None].bool()
    longer = torch.nn.functional.pad(square, (0, 4))  # for the places of a static cache
    wanted = additive_mask(padded, embeds, missing)
    assert wanted.shape == (2, 1, 5 + missing, 5 + missing)
    assert (wanted == 0)[..., missing:, missing:].equal(square) and (wanted != 0)[..., :missing].all()
    assert additive_mask(longer, embeds, missing).equal(wanted)
    lowest = torch.finfo(torch.float32).min
    assert additive_mask(torch.zeros(2, 1, 5, 9).masked_fill(~longer, lowest), embeds, missing).equal(wanted)
    assert additive_mask(None, embeds, missing)[1].equal(wanted[1])


@each_architecture
def test_settings_of_all_methods_run_recorded_or_say_why(architecture):
    """The second batch has images of other sizes with as many tiles: it replays what the first one recorded."""
    model, batches = copy.deepcopy(architecture.compressed()), [architecture.encode(first=first) for first in (0, 2)]
    recorder, known = recorded(model, limit=100), 0
    others = {name: KNOWN[name] for name in ("base_tile", "pooling", "pooling_2x2", "prumerge", "trim")}
    for name, fields in {**MODEL_SETTINGS, **others}.items():
        depends = fields.get("budget") is None and name not in others
        for batch in batches[:1] if depends else batches:
            wanted = tokens_of(architecture.compressed(), batch, **fields)
            torch.testing.assert_close(tokens_of(model, batch, **fields), wanted, msg=name)
        fronts = [key for key in model._graphs._recordings if key[0].startswith("front")]
        known += not depends
        assert len(fronts) == known, name
    assert recorder.recorded >= known
    assert model._graphs.refusals == ["front: it cannot be recorded: the number of tokens depends on the images"]


def test_a_recording_keeps_the_constants_that_it_reads(model):
    tokens_of(model, LLAVA.encode(ROWS))
    front = next(value for key, value in model._graphs._recordings.items() if key[0] == "front")
    _kept_constant.cache_clear()  # as other calls would in time
    assert len({id(constant) for constant in front.constants}) >= 3


class AddressRecorder:
    """Keeps nothing of what a computation reads, as a CUDA graph keeps addresses alone."""

    device_type = "cpu"

    def turn(self, device):
        return contextlib.nullcontext()

    def __call__(self, computation, inputs):
        with used_constants():  # nor those
            outputs = computation(inputs)
        return lambda: None, {name: value.clone() for name, value in outputs.items()}


def test_a_recording_keeps_the_layout_that_was_made_before_it(model, monkeypatch):
    made, layout_of = [], model._layout
    monkeypatch.setattr(model, "_layout", lambda *inputs: made.append(layout_of(*inputs)) or made[-1])
    model._graphs = GraphCache(recorder=AddressRecorder())
    tokens_of(model, LLAVA.encode(ROWS[:1]))
    assert any(key[0] == "front" for key in model._graphs._recordings)
    slots = [weakref.ref(layout.slots) for _, layout in made]
    made.clear()
    _kept_constant.cache_clear()
    gc.collect()
    assert slots and all(slot() is not None for slot in slots)
    model._graphs.clear()
    gc.collect()
    assert all(slot() is None for slot in slots)
