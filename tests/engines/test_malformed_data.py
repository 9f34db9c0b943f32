"""Malformed rows, pictures and files: `predict` and `embed` say what is wrong in a sentence, and never wait."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from predictions import answers, save_pictures, write_lines

datasets = pytest.importorskip("datasets")
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402

pytest_plugins = ("command_line",)

QUESTION = "What color is the circle?"
GOOD = {"image": "good.png", "question": QUESTION}
NO_IMAGE = "cannot identify image file, the formats that are read are"
NO_PATH = "image must be the path of a picture, got"
NO_QUESTION = "the question is missing or empty, got"
NO_ID = "id must be a string or an integer, got"


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# ---- pictures ------------------------------------------------------------------------------------------------------


def png(width, height, data):
    """A PNG file by hand, whose header may promise anything."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def cut(ending, share, **options):
    """A writer of a file that ends too early."""

    def write(path, picture):
        picture.save(path, ending, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return write


def filled(value):
    return lambda path, picture: Image.fromarray(np.full((30, 30), value, np.float32)).save(path, "TIFF")


BROKEN_PICTURES = {
    "empty": (lambda path, picture: path.write_bytes(b""), NO_IMAGE),
    "noise": (lambda path, picture: path.write_bytes(bytes(range(256)) * 20), NO_IMAGE),
    "magic bytes alone": (lambda path, picture: path.write_bytes(b"\x89PNG\r\n\x1a\n"), NO_IMAGE),
    "no pixels": (lambda path, picture: path.write_bytes(png(0, 0, zlib.compress(b""))), NO_IMAGE),
    "no data": (lambda path, picture: path.write_bytes(png(30, 30, zlib.compress(b""))), "image file is truncated"),
    "no zlib": (lambda path, picture: path.write_bytes(png(30, 30, b"garbage")), "broken data stream"),
    "a bomb": (lambda path, picture: path.write_bytes(png(60_000, 60_000, zlib.compress(b"0"))), "exceeds limit"),
    "half a PNG": (cut("PNG", 0.6), "."),
    "half a JPEG": (cut("JPEG", 0.3), "."),
    "half a WebP": (cut("WEBP", 0.3), "."),
    "half a GIF": (cut("GIF", 0.02), NO_IMAGE),
    "half a BMP": (cut("BMP", 0.5), "image file is truncated"),
    "SVG": (lambda path, picture: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), NO_IMAGE),
    "JPEG 2000": (lambda path, picture: picture.save(path, "JPEG2000"), NO_IMAGE),
    "PCX": (lambda path, picture: picture.save(path, "PCX"), NO_IMAGE),
    "NaN": (filled(np.nan), "it has pixels that are NaN or infinite"),
    "infinite": (filled(np.inf), "it has pixels that are NaN or infinite"),
    "1 x 4000": (lambda path, picture: Image.new("RGB", (1, 4000)).save(path), "it has 1 x 4000 pixels; the longer"),
    "4000 x 1": (lambda path, picture: Image.new("RGB", (4000, 1)).save(path), "it has 4000 x 1 pixels; the longer"),
    "a folder": (lambda path, picture: path.mkdir(), "it is a folder"),
    "a pipe": (lambda path, picture: os.mkfifo(path), "it is not a regular file"),
    "an endless device": (lambda path, picture: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "a link to nothing": (lambda path, picture: path.symlink_to("nowhere"), "no such file"),
    "a link to itself": (lambda path, picture: path.symlink_to(path), "Too many levels of symbolic links"),
}
ODD_PICTURES = {
    "CMYK": lambda path, picture: picture.convert("CMYK").save(path, "JPEG"),
    "YCbCr": lambda path, picture: picture.convert("YCbCr").save(path, "JPEG"),
    "Lab": lambda path, picture: Image.new("LAB", (30, 30)).save(path, "TIFF"),
    "palette": lambda path, picture: picture.convert("P").save(path),
    "palette with transparency": lambda path, picture: picture.convert("P").save(path, transparency=0),
    "grey with transparency": lambda path, picture: picture.convert("LA").save(path),
    "one bit": lambda path, picture: picture.convert("1").save(path),
    "animated GIF": lambda path, picture: picture.save(path, "GIF", save_all=True, append_images=[picture] * 2),
    "animated WebP": lambda path, picture: picture.save(path, "WEBP", save_all=True, append_images=[picture]),
    "several pages": lambda path, picture: picture.save(path, "TIFF", save_all=True, append_images=[picture]),
    "1 x 1": lambda path, picture: picture.resize((1, 1)).save(path),
    "a link": lambda path, picture: path.symlink_to("good.png"),
}


@pytest.fixture
def folder(tmp_path):
    (row,) = save_pictures(tmp_path, 1)
    (tmp_path / row["image"]).rename(tmp_path / "good.png")
    return tmp_path


def test_pictures(folder, error, capsys):
    with Image.open(folder / "good.png") as image:
        picture = image.convert("RGB")
    rows = []
    for number, (name, (write, _)) in enumerate(BROKEN_PICTURES.items()):
        write(folder / f"broken{number}.png", picture)
        rows.append({**GOOD, "id": name, "image": f"broken{number}.png"})
    for number, (name, write) in enumerate(ODD_PICTURES.items()):
        write(folder / f"odd{number}.png", picture)
        rows.append({**GOOD, "id": name, "image": f"odd{number}.png"})
    lines = {line["id"]: line for line in answers(write_lines(folder / "data.jsonl", rows), folder / "out.jsonl")}
    for number, (name, (_, message)) in enumerate(BROKEN_PICTURES.items()):
        assert f"the picture broken{number}.png cannot be read: " in lines[name]["error"], name
        assert message in lines[name]["error"], name
    assert all(lines[name]["answer"] for name in ODD_PICTURES)
    capsys.readouterr()  # the model's loading
    for number, (_, message) in enumerate(BROKEN_PICTURES.values()):
        data = write_lines(folder / "one.jsonl", [{**GOOD, "image": f"broken{number}.png"}])
        found = error("embed", "demo", data, folder / "embeds")
        assert found.startswith(f"one.jsonl, line 1: the picture broken{number}.png cannot be read: ")
        assert message in found


# ---- rows ----------------------------------------------------------------------------------------------------------

VALUES = {"float": 1.5, "true": True, "null": None, "object": {}, "nested": [["a"]], "text object": {"text": "a"}}
BAD_ROWS = {
    **{f"question: {name}": ({**GOOD, "question": value}, NO_QUESTION) for name, value in VALUES.items()},
    **{f"image: {name}": ({**GOOD, "image": value}, NO_PATH) for name, value in VALUES.items()},
    **{f"id: {name}": ({**GOOD, "id": value}, NO_ID) for name, value in VALUES.items() if name != "null"},
    "no question": ({"image": "good.png"}, NO_QUESTION),
    "no image": ({"question": QUESTION}, NO_PATH),
    "nothing": ({}, NO_QUESTION),
    "an image's bytes as text": ({**GOOD, "image": {"bytes": "abc", "path": None}}, NO_PATH),
    "an image's path as a number": ({**GOOD, "image": {"bytes": None, "path": 3}}, NO_PATH),
    "an empty path": ({**GOOD, "image": ""}, NO_PATH),
    "half a pair in a path": ({**GOOD, "image": "\ud83d.png"}, NO_PATH),
    "half a pair in an id": ({**GOOD, "id": "\ud83d"}, NO_ID),
    "an endless path": ({**GOOD, "image": "a/" * 500_000}, NO_PATH + " 1,000,000 characters: 'a/a/"),
    "data in place of a path": ({**GOOD, "image": "data:image/png;base64,iVBO"}, NO_PATH + " a URL, which is not"),
    "a URL": ({**GOOD, "image": "https://example.org/a.png"}, NO_PATH + " a URL, which is not opened"),
    "a long file name": ({**GOOD, "image": "a" * 300}, "cannot be read: File name too long"),
    "another file": ({**GOOD, "image": "/etc/passwd"}, NO_IMAGE),
    "an endless question": (
        {**GOOD, "question": "a" * 3_000_000},
        "the question may have 200,000 characters, got 3,000,",
    ),
    "a NaN": ("NaN", "expected an object, got nan"),
    "a NaN for an id": ('{"image": "good.png", "question": "a", "id": NaN}', NO_ID + " nan"),
    "an infinite question": ('{"image": "good.png", "question": Infinity}', NO_QUESTION + " inf"),
    "5,000 digits": (f'{{"image": "good.png", "question": "a", "id": {"9" * 5000}}}', "not JSON (Exceeds the limit"),
    "a number": ("5", "expected an object, got 5"),
    "null": ("null", "expected an object, got None"),
    "a truncated object": ('{"image": "good.png", "question": "Wh', "not JSON (Unterminated string"),
    "two objects": ('{"image": "good.png"} {"question": "a"}', "not JSON (Extra data"),
    "Python": ("{'image': 'good.png'}", "not JSON (Expecting property name"),
    "HTML": ("<html>", "not JSON (Expecting value"),
    "a tab": ("\t{", "not JSON"),
}


def test_rows(folder, error, capsys):
    rows = [row for row, _ in BAD_ROWS.values()]
    good, *found, last = answers(write_lines(folder / "data.jsonl", [GOOD, *rows, GOOD]), folder / "out.jsonl")
    assert good["answer"] == last["answer"] != ""
    for number, (line, (name, (_, message))) in enumerate(zip(found, BAD_ROWS.items(), strict=True), start=2):
        assert line["error"].startswith(f"data.jsonl, line {number}: "), name
        assert message in line["error"] and len(line["error"]) < 500, name
    capsys.readouterr()  # the model's loading
    for name, (row, message) in BAD_ROWS.items():
        found = error("embed", "demo", write_lines(folder / "one.jsonl", [GOOD, row]), folder / "embeds")
        assert found.startswith("one.jsonl, line 2: ") and message in found and len(found) < 500, name


# ---- files ---------------------------------------------------------------------------------------------------------

LINE = json.dumps(GOOD)
WRITE_LINES = "No line is a valid row: write one JSON object per line."
FILES = {
    "empty": (b"", "holds no rows"),
    "blank": (b" \n\n", "holds no rows"),
    "a byte-order mark": (b"\xef\xbb\xbf", "holds no rows"),
    "zeros": (b"\0" * 500, WRITE_LINES),
    "UTF-16": (LINE.encode("utf-16"), WRITE_LINES),
    "compressed": (b"\x1f\x8b\x08\0\xff", WRITE_LINES),
    "a list": (json.dumps([GOOD], indent=1).encode(), WRITE_LINES),
    "indented": (json.dumps(GOOD, indent=1).encode(), WRITE_LINES),
    "truncated": (LINE[:30].encode(), WRITE_LINES),
    "CSV": (b"image,question\ngood.png,What?\n", WRITE_LINES),
    "other columns": (b'{"img": "good.png", "q": "a"}', "has no column 'image'; its columns are img, q."),
    "Parquet's magic bytes": (b"PAR1", "cannot be read as a Parquet file: Parquet file size is 4 bytes"),
}
TABLES = {
    "truncated": (lambda whole: whole[: len(whole) // 2], "cannot be read as a Parquet file: Parquet magic bytes not"),
    "a wrong footer": (lambda whole: whole[:-8] + b"\xff\xff\xff\xffPAR1", "cannot be read as a Parquet file: "),
    "damaged pages": (lambda whole: whole[:10] + b"\xff" * 20 + whole[30:], "cannot be read as a Parquet file: "),
}
COLUMNS = {
    "no rows": ({"image": pyarrow.array([], "string"), "question": pyarrow.array([], "string")}, "holds no rows"),
    "numbers": ({"image": [1], "question": [2]}, NO_QUESTION + " 2"),
    "nulls": ({"image": pyarrow.nulls(1), "question": pyarrow.nulls(1)}, NO_QUESTION + " None"),
    "lists": ({"image": [["good.png"]], "question": [[QUESTION]]}, NO_QUESTION + " ['What"),
    "bytes": ({"image": ["good.png"], "question": [b"\xff"]}, NO_QUESTION + " b'"),
    "no image's bytes": ({"image": [b"nothing"], "question": [QUESTION]}, NO_IMAGE),
    "a time for an id": (
        {"image": ["good.png"], "question": [QUESTION], "id": pyarrow.array([0], pyarrow.timestamp("us"))},
        NO_ID + " datetime",
    ),
    "a time without a date": (
        {"image": ["good.png"], "question": [QUESTION], "id": pyarrow.array([2**62], pyarrow.timestamp("us"))},
        "the row cannot be read (",
    ),
    "a map": (
        {"image": pyarrow.array([[("a", b"b")]], pyarrow.map_("string", "binary")), "question": [QUESTION]},
        "cannot be read as a Parquet file: ",
    ),
}


def refusals(error, folder, data):
    """What both commands say about data that hold no row to answer."""
    yield error("predict", data, "--model", "demo", "--output", folder / "out.jsonl")
    yield error("embed", "demo", data, folder / "embeds")
    assert not [*folder.glob("out.jsonl*"), *folder.glob("embeds*")]


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_files(folder, error, content, message):
    (folder / "data.jsonl").write_bytes(content)
    for found in refusals(error, folder, folder / "data.jsonl"):
        assert "data.jsonl" in found and message in found


@pytest.mark.parametrize(("change", "message"), TABLES.values(), ids=TABLES)
def test_damaged_tables(folder, error, change, message):
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": ["good.png"], "question": [QUESTION]}), path)
    path.write_bytes(change(path.read_bytes()))
    for found in refusals(error, folder, path):
        assert "data.parquet" in found and message in found


@pytest.mark.parametrize(("columns", "message"), COLUMNS.values(), ids=COLUMNS)
def test_columns_of_tables(folder, error, columns, message):
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = error("embed", "demo", path, folder / "embeds")
    assert "data.parquet" in found and message in found
    if found.startswith("data.parquet, row 0: "):
        (line,) = answers(path, folder / "out.jsonl")
        assert message in line["error"]
    else:
        assert message in error("predict", path, "--model", "demo", "--output", folder / "out.jsonl")


def saved(change):
    """A writer of a saved data set that is changed afterwards."""

    def write(path):
        datasets.Dataset.from_list([GOOD]).save_to_disk(str(path))
        change(path)

    return write


def pictures(**files):
    """A writer of a folder with a picture and other files."""

    def write(path):
        Image.new("RGB", (30, 30)).save(path / "a.png")
        for name, text in files.items():
            (path / name.replace("_", ".")).write_text(text)

    return write


FOLDERS = {
    "empty": (lambda path: None, "cannot be read as a folder of data: "),
    "no pictures": (lambda path: (path / "a.txt").write_text("a"), "cannot be read as a folder of data: "),
    "no questions": (pictures(), "has no column 'question'; its columns are image."),
    "metadata that are no JSON": (pictures(metadata_jsonl='{"file_name": "a.png"'), "cannot be read as a folder of"),
    "metadata without names": (pictures(metadata_csv="a\n"), "cannot be read as a folder of data: "),
    "metadata that are no Parquet": (pictures(metadata_parquet="PAR1"), "cannot be read as a folder of data: "),
    "no state": (lambda path: (path / "state.json").write_text("{"), "cannot be read as a folder of data: "),
    "other information": (
        saved(lambda path: (path / "dataset_info.json").write_text("[]")),
        "cannot be read as a folder of data: ",
    ),
    "no rows": (saved(lambda path: next(path.glob("*.arrow")).unlink()), "cannot be read as a folder of data: "),
    "damaged rows": (
        saved(lambda path: next(path.glob("*.arrow")).write_bytes(b"no")),
        "cannot be read as a folder of data: ",
    ),
    "a link to itself": (lambda path: (path / "self").symlink_to(path), "cannot be read as a folder of data: "),
}


@pytest.mark.parametrize(("write", "message"), FOLDERS.values(), ids=FOLDERS)
def test_folders(folder, error, write, message):
    (folder / "data").mkdir()
    write(folder / "data")
    for found in refusals(error, folder, folder / "data"):
        assert "data" in found and message in found


PATHS = {
    "an empty name": ("", "The name of the data is empty: name a file or folder."),
    "a null byte": ("a\0b", "cannot be opened: embedded null byte."),
    "a long name": ("n" * 300, "cannot be opened: File name too long."),
    "a picture": ("good.png", "is a picture, expected questions"),
    "below a file": ("good.png/data.jsonl", "no such file or folder."),
    "a link to nothing": ("nothing", "no such file or folder."),
    "a link to itself": ("itself", "cannot be opened: Too many levels of symbolic links."),
    "a pipe": ("pipe", "is neither a regular file nor a folder; write the rows to a file first."),
    "a device": ("/dev/zero", "is neither a regular file nor a folder; write the rows to a file first."),
}


@pytest.mark.parametrize(("name", "message"), PATHS.values(), ids=PATHS)
def test_paths(folder, error, monkeypatch, name, message):
    monkeypatch.chdir(folder)
    (folder / "nothing").symlink_to("nowhere")
    (folder / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe")
    for found in refusals(error, folder, name):
        assert message in found


def test_a_name_that_is_no_text(folder):
    path = os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl")
    first, second = answers(write_lines(type(folder)(path), [GOOD, "5"]), folder / "out.jsonl")
    assert first["answer"]
    assert second["error"] == r"\udcff.jsonl, line 2: expected an object, got 5."
