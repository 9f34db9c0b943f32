"""Greyscale images of more than 8 bits are read by their own depth, however they reach the processor."""

import numpy as np
import pytest
import tiny
from architectures import each_architecture, prompt_of
from PIL import Image

GREY = np.random.default_rng(0).normal(128, 50, (64, 72)).clip(0, 255)
DEEP = {
    "16 bits": (GREY * 257).astype(np.uint16),
    "32 bits": (GREY * 257).astype(np.int32),
    "floats": (GREY / 255).astype(np.float32),
    "floats to 255": GREY.astype(np.float32),
}
each_depth = pytest.mark.parametrize("values", DEEP.values(), ids=DEEP)
PROMPT = prompt_of("What is grey?", 1)


def pixels(processor, **call):
    return processor(**{"text": PROMPT, "return_tensors": "pt", **call})["pixel_values"]


def chat_pixels(processor, part):
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is grey?"}]}]
    encoding = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    return encoding["pixel_values"]


@each_architecture
@each_depth
def test_every_way_in_reads_it_as_the_image_of_8_bits(architecture, values, tmp_path):
    processor, image = architecture.processor(), Image.fromarray(values)
    expected = pixels(architecture.stock_processor(), images=Image.fromarray(np.rint(GREY).astype(np.uint8)))
    path = tmp_path / ("grey.png" if image.mode == "I;16" else "grey.tiff")
    image.save(path)
    found = [
        pixels(processor, images=image),
        pixels(processor, images=[image]),
        pixels(processor, images=[[image]]),
        chat_pixels(processor, {"type": "image", "image": image}),
        chat_pixels(processor, {"type": "image", "path": str(path)}),
        chat_pixels(processor, {"type": "image", "url": str(path)}),
    ]
    assert image.mode in ("I", "I;16", "F")
    level = 1 / 255 / min(processor.image_processor.image_std)
    for number, value in enumerate(found):
        assert (value - expected).abs().max() < 1.5 * level, number


@each_architecture
def test_orientation_is_the_stock_one(architecture, tmp_path):
    """A file is turned by its EXIF orientation, an open image is not."""
    processor, stock, path = architecture.processor(), architecture.stock_processor(), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP["16 bits"]).save(path, exif=exif)
    shallow = tmp_path / "shallow.png"
    Image.fromarray(np.rint(GREY).astype(np.uint8)).save(shallow, exif=exif)
    calls = []
    with Image.open(path) as deep, Image.open(shallow) as grey:
        for one, image in ((processor, deep), (stock, grey)):
            part = {"type": "image", "image": image}
            calls.append((pixels(one, images=image), chat_pixels(one, part)))
    for row, (one, file) in enumerate(((processor, path), (stock, shallow))):
        calls[row] += (chat_pixels(one, {"type": "image", "path": str(file)}),)
    assert not np.array_equal(calls[1][0], calls[1][2])
    for number, (ours, theirs) in enumerate(zip(*calls, strict=True)):
        assert (ours - theirs).abs().max() < 0.05, number


@each_architecture
def test_values_without_a_range_are_refused(architecture):
    with pytest.raises(ValueError, match=r"An image of 72 x 64 pixels cannot be read: it has pixels that are NaN"):
        pixels(architecture.processor(), images=Image.fromarray(np.where(GREY > 250, np.nan, GREY).astype(np.float32)))


@each_architecture
@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint16, np.int32, np.float32, np.float64, bool], ids=str)
def test_arrays_are_read_or_refused_as_by_the_stock_processor(architecture, kind):
    array = np.stack([GREY * (257 if kind in (np.uint16, np.int32) else 1)] * 3, -1).astype(kind)
    answers = []
    for processor in (architecture.processor(), architecture.stock_processor()):
        try:
            answers.append(pixels(processor, images=array))
        except ValueError as error:
            answers.append(str(error))
    if isinstance(answers[1], str):
        assert answers[0] == answers[1]
        assert "values outside the range" in answers[0]
    else:
        assert np.array_equal(*answers)


@each_architecture
def test_other_images_stay_as_they_are(architecture):
    processor, given = architecture.processor(), tiny.pictures(2)
    before = [list(given), {"images": given}]
    assert np.array_equal(
        pixels(processor, images=given, text=prompt_of("What?", 2)),
        pixels(architecture.stock_processor(), images=given, text=prompt_of("What?", 2)),
    )
    assert before == [given, {"images": given}]
