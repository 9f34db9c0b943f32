"""Image files of every depth are read alike, by every reader."""

import base64
import contextlib
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile

from reccomp_hf.cli.image_questions import file_questions
from reccomp_hf.data.pictures import FORMATS, open_picture, upright_rgb
from reccomp_hf.data.rows import picture_of
from reccomp_hf.engines.server.errors import RequestError
from reccomp_hf.engines.server.images import ImageReader
from reccomp_hf.measure.evaluation import load_samples
from reccomp_hf.measure.evaluation.samples import Sample

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = GREY.astype(np.float64)

# A ramp from black to white in every depth, the format, and the largest number of levels by which it may differ.
RAMPS = {
    "8 bits": (GREY, "PNG", 0),
    "16 bits in a PNG": ((WIDE * 257).astype(np.uint16), "PNG", 0),
    "16 bits in a TIFF": ((WIDE * 257).astype(np.uint16), "TIFF", 0),
    "16 bits, big end first": ((WIDE * 257).astype(">u2"), "TIFF", 0),
    "8 bits in 32": (GREY.astype(np.int32), "TIFF", 0),
    "16 bits in 32": ((WIDE * 257).astype(np.int32), "TIFF", 0),
    "32 bits": ((WIDE * (2**31 - 1) / 255).astype(np.int32), "TIFF", 0),
    "32 bits below 0": (((WIDE - 100) * 10_000).astype(np.int32), "TIFF", 0),
    "floats up to 1": ((WIDE / 255).astype(np.float32), "TIFF", 0),
    "floats that overshoot": ((WIDE / 255 * 1.02 - 0.01).astype(np.float32), "TIFF", 3),
    "floats up to 255": (WIDE.astype(np.float32), "TIFF", 0),
    "floats up to 65535": ((WIDE * 257).astype(np.float32), "TIFF", 0),
    "floats below 0": ((WIDE * 40 - 5000).astype(np.float32), "TIFF", 0),
}
each_ramp = pytest.mark.parametrize(("ramp", "file_format", "tolerance"), RAMPS.values(), ids=RAMPS)
SIXTEEN_BITS = RAMPS["16 bits in a PNG"][0]


def written(ramp, file_format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, file_format, **options)
    return file.getvalue()


def plain_tiff(values, entries):
    """An uncompressed greyscale TIFF; Pillow writes neither signed 16 bits nor unsigned 32 bits."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data), **entries}
    directory = len(tags).to_bytes(2, "little")
    for tag, value in sorted(tags.items()):
        kind = 4 if tag in (273, 279) else 3
        directory += struct.pack("<HHLL", tag, kind, 1, value)
    return b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + directory + bytes(4)


def levels(image):
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def distance(image):
    return int(np.abs(levels(image).astype(int) - GREY).max())


@each_ramp
def test_every_depth_has_black_and_white_of_its_own(ramp, file_format, tolerance):
    assert distance(open_picture(io.BytesIO(written(ramp, file_format)))) <= tolerance
    if ramp.dtype.isnative:
        assert distance(upright_rgb(Image.fromarray(ramp))) <= tolerance


@pytest.mark.parametrize(
    ("values", "entries"),
    [
        ((WIDE * (2**32 - 1) / 255).astype(np.uint32), {258: 32, 339: 1}),
        ((WIDE * 32767 / 255).astype(np.int16), {258: 16, 339: 2}),
        ((WIDE * 257).astype(np.uint16), {258: 16, 339: 1}),
    ],
    ids=["unsigned 32", "signed 16", "unsigned 16"],
)
def test_the_tags_of_a_tiff_tell_its_depth(values, entries):
    assert distance(open_picture(io.BytesIO(plain_tiff(values, entries)))) <= 1


def test_a_plain_picture_of_one_value_is_read():
    for value in (0, 40_000):
        image = open_picture(io.BytesIO(written(np.full((9, 9), value, np.uint16))))
        assert np.unique(levels(image)).tolist() == [round(value / 257)]
    image = open_picture(io.BytesIO(written(np.full((9, 9), -3.5, np.float32), "TIFF")))
    assert np.unique(levels(image)).tolist() == [0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    ramp = (WIDE / 255).astype(np.float32)
    ramp[3, 5] = value
    with pytest.raises(OSError, match="it has pixels that are NaN or infinite"):
        open_picture(io.BytesIO(written(ramp, "TIFF")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_a_deep_picture_is_turned_by_its_exif(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    data = written(SIXTEEN_BITS, file_format, exif=exif)
    assert (levels(open_picture(io.BytesIO(data))) == np.rot90(GREY, -1)).all()


def test_every_reader_scales_by_depth(tmp_path):
    """Rows are the images of `predict`, `embed` and `eval`; `demo --image` and `plot` share `file_questions`."""
    data = written(SIXTEEN_BITS)
    (tmp_path / "deep.png").write_bytes(data)
    row = {"image": "deep.png", "question": "What?", "answers": ["a"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (sample,) = load_samples(tmp_path / "data.jsonl")
    images = [
        picture_of("deep.png", tmp_path).open(),
        picture_of(data, tmp_path).open(),
        sample.open(),
        Sample(Image.fromarray(SIXTEEN_BITS), "deep", "What?", ("a",)).open(),
        file_questions(str(tmp_path / "deep.png")).image,
        ImageReader()(f"data:image/png;base64,{base64.b64encode(data).decode()}", "url"),
    ]
    assert [distance(image) for image in images] == [0] * len(images)


# ---- what is refused -----------------------------------------------------------------------------------------------

LONG = Image.new("RGB", (400_000, 8))
PROPORTIONS = "the longer side may be 100 times the shorter one"


def refused_by_every_reader(folder, name):
    """The messages with which every reader refuses a file in the folder."""
    row = {"image": name, "question": "What?", "answers": ["a"]}
    (folder / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    url = f"data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}"
    readers = [
        lambda: picture_of(name, folder).open(),
        lambda: picture_of((folder / name).read_bytes(), folder).open(),
        lambda: load_samples(folder / "data.jsonl"),
        lambda: file_questions(str(folder / name)),
        lambda: ImageReader()(url, "url"),
    ]
    messages = []
    for read in readers:
        with pytest.raises((OSError, ValueError, RequestError)) as caught:
            read()
        messages.append(str(caught.value))
    assert picture_of(name, folder).size() is None
    return messages


def test_extreme_proportions_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    LONG.save(tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size < 20_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it is decoded"))
    messages = refused_by_every_reader(tmp_path, "long.png")
    assert all("it has 400000 x 8 pixels" in message and PROPORTIONS in message for message in messages)
    with pytest.raises(ValueError, match=PROPORTIONS):
        upright_rgb(LONG)


@pytest.mark.parametrize(("size", "read"), [((800, 8), True), ((8, 800), True), ((1, 800), True), ((8, 801), False)])
def test_the_limit_of_proportions(size, read):
    with contextlib.nullcontext() if read else pytest.raises(ValueError, match=PROPORTIONS):
        upright_rgb(Image.new("L", size))


@pytest.mark.parametrize("file_format", ["EPS", "PDF", "PPM", "ICO"])
def test_other_formats_are_refused(tmp_path, file_format):
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png", file_format)
    messages = refused_by_every_reader(tmp_path, "other.png")
    assert all("the formats that are read are PNG, JPEG, WEBP, GIF, BMP" in message for message in messages)


@pytest.mark.parametrize("file_format", FORMATS)
def test_these_formats_are_read(file_format):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, file_format)
    file.seek(0)
    assert open_picture(file).size == (32, 32)
