"""Arguments of another type than the processor's are refused with a sentence, before anything is computed."""

import numpy as np
import pytest
import torch
from architectures import LLAVA_NEXT, ROWS, each_architecture, prompt_of

FIELDS = ("input_ids", "attention_mask", "pixel_values", "recovery_input_ids", "recovery_attention_mask")
OTHERS = {"list": torch.Tensor.tolist, "array": torch.Tensor.numpy, "int": lambda value: 5, "text": lambda value: "x"}


def calls(model):
    return model, model.generate, model.compress_inputs, model.recover


@each_architecture
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_is_no_tensor(architecture, name, change):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    for call in calls(model):
        if (call, name) == (model.recover, "attention_mask"):
            continue  # it reads none
        with pytest.raises(ValueError, match=rf"{name} must be a tensor.* got \w+: .*return_tensors='pt'"):
            call(**{**batch, name: change(batch[name])})


@each_architecture
@pytest.mark.parametrize("name", ["input_ids", "recovery_input_ids"])
@pytest.mark.parametrize("change", [torch.Tensor.float, torch.Tensor.bool], ids=["float", "bool"])
def test_ids_that_are_no_integers(architecture, name, change):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    for call in calls(model):
        with pytest.raises(ValueError, match=rf"{name} must be an integer tensor.*, got torch\.\w+ of shape"):
            call(**{**batch, name: change(batch[name])})


@each_architecture
def test_other_dimensions(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    for call in calls(model):
        with pytest.raises(ValueError, match=r"input_ids must be an integer tensor of 2 dimensions, got torch\.int64"):
            call(**{**batch, "input_ids": batch["input_ids"][0]})
        with pytest.raises(ValueError, match=r"pixel_values must be a tensor \(images.*got Tensor of shape \(\d+,\)"):
            call(**{**batch, "pixel_values": batch["pixel_values"].flatten()})


@each_architecture
@pytest.mark.parametrize("given", [5, [5], [None], [["a", 5]], {"a": "b"}, b"x"], ids=str)
def test_questions_that_are_no_texts(architecture, given):
    with pytest.raises(ValueError, match="recovery_text must be one question per row"):
        architecture.processor()(text="What?", recovery_text=given)


@each_architecture
@pytest.mark.parametrize("shape", [(0, 0, 3), (3, 0, 4)], ids=str)
def test_images_without_pixels(architecture, shape):
    with pytest.raises(ValueError, match="images must have pixels, got shape"):
        architecture.processor()(images=np.zeros(shape, np.uint8), text=prompt_of("What?", 1))
    with pytest.raises(ValueError, match="images must have pixels, got shape"):
        architecture.processor()(images=[[np.zeros(shape, np.uint8)]], text=prompt_of("What?", 1))


@each_architecture
@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 5}], ids=str)
def test_text_parts_without_text(architecture, part):
    with pytest.raises(ValueError, match="A text part of message 0 of a chat needs a text"):
        architecture.processor().apply_chat_template([{"role": "user", "content": [part]}])


@each_architecture
@pytest.mark.parametrize("wrong", [-1, "vocabulary"], ids=str)
def test_ids_that_the_text_encoder_does_not_have(architecture, wrong):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    last = model.config.token_recovery.text_encoder_config["vocab_size"] - 1
    ids = batch["recovery_input_ids"].clone()
    ids[0, 0, 1] = last
    model.recover(**{**batch, "recovery_input_ids": ids})
    ids[0, 0, 1] = last + 1 if wrong == "vocabulary" else wrong
    for call in calls(model):
        with pytest.raises(ValueError, match=rf"recovery_input_ids must be ids from 0 to {last}, got -?\d+ to \d+:"):
            call(**{**batch, "recovery_input_ids": ids})


SIZES = {
    "int": 5,
    "text": "x",
    "texts": ["ab"],
    "numbers": [5, 5],
    "digits": [["40", "40"]],
    "three": torch.tensor([[40, 40, 3]]),
    "flat": torch.tensor([40, 40]),
    "deep": torch.tensor([[[40, 40]]]),
    "empty": torch.zeros(0, 2, dtype=torch.int64),
    "zero": torch.tensor([[0, 40]]),
    "negative": torch.tensor([[40, -40]]),
    "fractions": torch.tensor([[40.5, 40.0]]),
    "nan": torch.tensor([[float("nan"), 40.0]]),
    "infinite": [[float("inf"), 40]],
    "none": [[None, 40]],
    "dict": {"height": 40, "width": 40},
}


@pytest.mark.parametrize("given", SIZES.values(), ids=SIZES)
def test_sizes_that_are_no_pairs_of_pixels(given):
    model, batch = LLAVA_NEXT.compressed(), LLAVA_NEXT.encode(ROWS[:1])
    for call in (*calls(model), lambda **batch: model.encode_images(batch["pixel_values"], batch["image_sizes"])):
        with pytest.raises(ValueError, match=r"image_sizes must be the height and width in pixels of every image"):
            call(**{**batch, "image_sizes": given})


@torch.no_grad()
def test_sizes_that_are_pairs_of_pixels():
    model, batch = LLAVA_NEXT.compressed(), LLAVA_NEXT.encode(ROWS[:1])
    expected = model(**batch).logits
    for same in (batch["image_sizes"].tolist(), batch["image_sizes"].numpy(), batch["image_sizes"].float()):
        assert torch.equal(model(**{**batch, "image_sizes": same}).logits, expected)
