"""Arguments of another type than the processor's are refused with a sentence, before anything is computed."""

import numpy as np
import pytest
import torch
from architectures import CACHE, LLAVA, LLAVA_NEXT, ROWS, each_architecture, prompt_of
from PIL import Image

from reccomp_hf import Conversation

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


def changed(name, place, value):
    """A change of one id of the last row."""

    def change(batch):
        values = batch[name].clone()
        values[-1, place] = value
        return {name: values}

    return change


UNREAD = {
    "no ids": (lambda b: {"input_ids": None}, "input_ids"),
    "small ids": (lambda b: {"input_ids": b["input_ids"].short()}, "input_ids must be an integer tensor.*int16"),
    "sparse ids": (lambda b: {"input_ids": b["input_ids"].to_sparse()}, "input_ids must be a dense tensor.*sparse"),
    "complex ids": (lambda b: {"input_ids": b["input_ids"] * 1j}, "input_ids must be a dense tensor of real"),
    "sparse pixels": (
        lambda b: {"pixel_values": b["pixel_values"].to_sparse()},
        "pixel_values must be a dense tensor",
    ),
    "bool pixels": (lambda b: {"pixel_values": b["pixel_values"] > 0}, "pixel_values must be numbers, got torch.bool"),
    "one channel": (
        lambda b: {"pixel_values": b["pixel_values"][..., :1, :, :]},
        r"pixel_values must be a tensor \(images, ..., 3, height, width\), got Tensor of shape .*1, 40, 40",
    ),
    "no windows": (lambda b: {"recovery_input_ids": b["recovery_input_ids"][:, :0]}, r"\(1, 0, \d+\); none .* be 0"),
    "no length": (lambda b: {"recovery_input_ids": b["recovery_input_ids"][..., :0]}, r", 0\); none of them may be 0"),
    "negative question mask": (
        lambda b: {"recovery_attention_mask": -b["recovery_attention_mask"]},
        "recovery_attention_mask must be 1 for tokens and 0 for padding, got negative values",
    ),
}
UNREAD_PROMPTS = {
    "unknown id": (changed("input_ids", -1, 10**6), r"input_ids must be ids from 0 to \d+, got \d+ to 1000000"),
    "negative id": (changed("input_ids", -1, -7), r"input_ids must be ids from 0 to \d+, got -7 to"),
    "complex mask": (lambda b: {"attention_mask": b["attention_mask"] * 1j}, "attention_mask must be a dense tensor"),
    "additive mask": (
        lambda b: {"attention_mask": torch.zeros(b["input_ids"].shape).index_fill(1, torch.tensor([0]), -torch.inf)},
        "attention_mask must be 1 for tokens and 0 for padding, got negative values or NaN, as a mask that is added",
    ),
    "mask of NaN": (
        lambda b: {"attention_mask": b["attention_mask"] * float("nan")},
        "attention_mask must be 1 for tokens and 0 for padding, got negative values or NaN",
    ),
    "float positions": (
        lambda b: {"position_ids": b["input_ids"].float()},
        "position_ids must be an integer tensor of 2 dimensions, got torch.float32",
    ),
    "short positions": (
        lambda b: {"position_ids": b["input_ids"][:, 1:]},
        r"position_ids must have the shape of input_ids \(1, \d+\) with images, or its columns in one row, got",
    ),
}


@each_architecture
@pytest.mark.parametrize(
    ("change", "message"), [*UNREAD.values(), *UNREAD_PROMPTS.values()], ids=UNREAD | UNREAD_PROMPTS
)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_values_that_the_model_does_not_have(architecture, change, message, positions):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    recovers = any(message == other for _, other in UNREAD.values())
    for call in calls(model)[: 4 if recovers else 3]:
        with pytest.raises(ValueError, match=message):
            call(**{**batch, **change(batch)}, token_recovery={"position_ids": positions})


LABELS = {
    "float": (torch.Tensor.float, "labels must be an integer tensor, got torch.float32"),
    "list": (torch.Tensor.tolist, "labels must be a tensor, got list"),
    "unknown": (lambda labels: labels + 10**6, r"labels must be ids from 0 to \d+ or -100, got"),
    "negative": (lambda labels: labels * 0 - 5, r"labels must be ids from 0 to \d+ or -100, got -5 to -5"),
}


@each_architecture
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(("change", "message"), LABELS.values(), ids=LABELS)
def test_labels_that_are_no_ids(architecture, name, change, message):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    for call in (model, model.compress_inputs):
        with pytest.raises(ValueError, match=message):
            call(**batch, **{name: change(labels)})


@torch.no_grad()
@each_architecture
def test_narrow_integers_are_read(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    expected = model(**batch, labels=labels)
    narrow = {name: value.int() for name, value in batch.items() if name not in ("pixel_values", "image_sizes")}
    ours = model(**batch | narrow, labels=labels.int())
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.loss, expected.loss)
    ignored = model(**batch, labels=labels.masked_fill(labels == -100, -7), ignore_index=-7)
    assert torch.equal(ignored.logits, expected.logits)


@each_architecture
def test_what_is_no_cache(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    for cache in ("x", [1]):
        with pytest.raises(
            ValueError, match=rf"{CACHE} must be a cache of transformers, such as Dyn.*, got .{cache[0]}"
        ):
            model.generate(**batch, **{CACHE: cache}, max_new_tokens=1)


NARROW = {
    "array": np.zeros((1, 65_000, 3), np.uint8),
    "grey": np.zeros((65_000, 2), np.uint8),
    "channels first": np.zeros((3, 5, 900), np.uint8),
    "picture": Image.new("RGB", (900, 3)),
    "deep": Image.new("I;16", (1, 65_000)),
}


@each_architecture
@pytest.mark.parametrize("image", NARROW.values(), ids=NARROW)
def test_images_that_would_be_enlarged_to_gigabytes(architecture, image, tmp_path):
    processor, model = architecture.processor(), architecture.compressed()
    message = r"An image cannot be read: it has \d+ x \d+ pixels; the longer side may be 100 times the shorter one"
    for call in (
        lambda image: processor(images=[image], text=prompt_of("What?", 1)),
        lambda image: Conversation(model, processor).ask("What?", image),
    ):
        with pytest.raises(ValueError, match=message):
            call(image)
    Image.new("L", (9000, 10)).save(tmp_path / "thin.png")
    with pytest.raises(ValueError, match=message):
        processor(images=str(tmp_path / "thin.png"), text=prompt_of("What?", 1))


def test_a_picture_without_pixels():
    with pytest.raises(ValueError, match=r"images must have pixels, got shape \(0, 10\)"):
        LLAVA.processor()(images=Image.new("RGB", (0, 10)), text=prompt_of("What?", 1))


@each_architecture
@pytest.mark.parametrize(
    "part", [{"type": "video", "path": "a.mp4"}, {"type": "audio"}, {"text": "Hi"}, {"type": 5}], ids=str
)
def test_parts_that_a_template_would_leave_out(architecture, part):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="A part of message 0 of a chat must be of type 'text' or 'image', got"):
        architecture.processor().apply_chat_template(messages)


@each_architecture
def test_parts_of_a_processor_and_a_conversation_that_are_none(architecture):
    with pytest.raises(ValueError, match="recovery_tokenizer must be a CLIP tokenizer or None, got 5"):
        architecture.processor(recovery_tokenizer=5)
    with pytest.raises(ValueError, match=r"recovery_max_length must be the number of positions.*got '77'"):
        architecture.processor(recovery_max_length="77")
    with pytest.raises(ValueError, match=r"model must be that of a checkpoint from reccomp_hf\.convert, got NoneType"):
        Conversation(None, architecture.processor())
    with pytest.raises(ValueError, match=r"processor must be that of a .* got Llava\w*Processor"):
        Conversation(architecture.compressed(), architecture.stock_processor())
