"""The data of `predict`: every format gives the same answers, and a row that cannot be asked does not end the run."""

import json

import pytest
from demo_model import demo_model
from PIL import Image
from predictions import answers, ask, read_lines, save_pictures, write_lines

from reccomp_hf.data.prompts import build_prompt
from reccomp_hf.engines.predict import Columns

datasets = pytest.importorskip("datasets")
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402

COUNT = 6


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def rows_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return save_pictures(folder, COUNT), folder


@pytest.fixture(scope="module")
def wanted(rows_in, tmp_path_factory):
    """The lines for a file of JSON lines, which the tests below compare with."""
    rows, folder = rows_in
    return answers(write_lines(folder / "data.jsonl", rows), tmp_path_factory.mktemp("wanted") / "answers.jsonl")


def without(lines, *names):
    return [{name: value for name, value in line.items() if name not in names} for line in lines]


# ---- formats -------------------------------------------------------------------------------------------------------


def test_lines_hold_what_generate_answers(rows_in, wanted):
    """Asked one by one by the model itself, which reads the file of the picture."""
    rows, folder = rows_in
    model, processor = demo_model()
    for number, (row, line) in enumerate(zip(rows, wanted, strict=True)):
        with Image.open(folder / row["image"]) as image:
            turn = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            inputs = processor(images=image.convert("RGB"), text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        tokens = {"visual_tokens": 16, "uncompressed_visual_tokens": 144}
        assert line == {"row": number, **row, "answer": answer, **tokens}
    assert len({line["answer"] for line in wanted}) > 2


def _image_structs(rows, folder):
    return [{"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]} for row in rows]


PARQUET = {
    "bytes": lambda rows, folder: [(folder / row["image"]).read_bytes() for row in rows],
    "struct": _image_structs,
    "struct of a path": lambda rows, folder: [{"bytes": None, "path": row["image"]} for row in rows],
    "path": lambda rows, folder: [row["image"] for row in rows],
    "list of paths": lambda rows, folder: [[row["image"]] for row in rows],
}


@pytest.mark.parametrize("images", PARQUET.values(), ids=PARQUET)
def test_parquet(rows_in, wanted, tmp_path, images):
    rows, folder = rows_in
    columns = {"picture": images(rows, folder), **{name: [row[name] for row in rows] for name in ("id", "question")}}
    path = folder / f"{tmp_path.name}.data"  # what a file is, it says itself
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = answers(path, tmp_path / "out.jsonl", columns=Columns(image="picture"))
    assert without(found, "image") == without(wanted, "image")
    named = [row["image"] for row in rows] if images is not PARQUET["bytes"] else [None] * COUNT
    assert [line["image"] for line in found] == named


def test_a_parquet_file_of_the_datasets_library(rows_in, wanted, tmp_path):
    rows, folder = rows_in
    features = datasets.Features({name: datasets.Value("string") for name in ("id", "question")})
    features["image"] = datasets.Image()
    data = datasets.Dataset.from_list(
        [{**row, "image": image} for row, image in zip(rows, _image_structs(rows, folder), strict=True)],
        features=features,
    )
    data.to_parquet(tmp_path / "data.parquet")
    assert answers(tmp_path / "data.parquet", tmp_path / "out.jsonl") == wanted
    data.save_to_disk(tmp_path / "saved")
    assert answers(tmp_path / "saved", tmp_path / "saved.jsonl") == wanted


def test_a_folder_of_pictures(rows_in, wanted, tmp_path):
    rows, folder = rows_in
    (tmp_path / "photos").mkdir()
    names = sorted({row["image"] for row in rows})
    for name in names:
        (tmp_path / "photos" / name).write_bytes((folder / name).read_bytes())
    asked = "What color is the circle?"
    found = answers(tmp_path / "photos", tmp_path / "out.jsonl", columns=Columns(asked=asked))
    assert [(line["id"], line["row"], line["image"]) for line in found] == [
        (number, number, name) for number, name in enumerate(names)
    ]
    assert {line["question"] for line in found} == {asked}
    (same,) = [line for line in wanted if (line["question"], line["image"]) == (asked, names[0])]
    assert found[0]["answer"] == same["answer"]
    with pytest.raises(ValueError, match="photos has no column 'question'; its columns are image"):
        ask(tmp_path / "photos", tmp_path / "none.jsonl")
    metadata = [{"file_name": row["image"], "question": row["question"], "id": row["id"]} for row in rows]
    write_lines(tmp_path / "photos" / "metadata.jsonl", metadata)
    assert answers(tmp_path / "photos", tmp_path / "metadata.jsonl") == wanted


def test_names_of_columns_and_limits(rows_in, wanted, tmp_path):
    rows, folder = rows_in
    renamed = [{"a": row["image"], "b": row["question"], "c": 10 + number} for number, row in enumerate(rows)]
    data = write_lines(folder / "renamed.jsonl", renamed)
    found = answers(data, tmp_path / "out.jsonl", columns=Columns("a", "b", "c"), limit=3)
    assert [line["id"] for line in found] == [10, 11, 12]
    assert without(found, "id") == without(wanted[:3], "id")
    found = answers(data, tmp_path / "rows.jsonl", columns=Columns("a", "b"))
    assert [line["id"] for line in found] == list(range(COUNT))
    with pytest.raises(ValueError, match=r"renamed\.jsonl has no column 'image'; its columns are a, b, c"):
        ask(data, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no column 'd'"):
        ask(data, tmp_path / "none.jsonl", columns=Columns("a", "b", "d"))


def test_several_pictures_a_row(rows_in, tmp_path):
    rows, folder = rows_in
    names = sorted({row["image"] for row in rows})[:2]
    many = [{"image": names[:count], "question": "What color is the circle?"} for count in (1, 2, 1, 2)]
    found = answers(write_lines(folder / "many.jsonl", many), tmp_path / "out.jsonl")
    assert [line["visual_tokens"] for line in found] == [16, 32, 16, 32]
    assert [line["uncompressed_visual_tokens"] for line in found] == [144, 288, 144, 288]
    assert [line["image"] for line in found] == [names[0], names, names[0], names]


def test_settings_reach_the_model(rows_in, tmp_path):
    rows, folder = rows_in
    data = write_lines(folder / "settings.jsonl", rows)
    off = answers(data, tmp_path / "off.jsonl", token_recovery={"enabled": False})
    assert {line["visual_tokens"] for line in off} == {144}
    few = answers(data, tmp_path / "few.jsonl", token_recovery={"budget": 5})
    assert {line["visual_tokens"] for line in few} == {5}
    with pytest.raises(ValueError, match="only 144 patches"):
        ask(data, tmp_path / "many.jsonl", token_recovery={"budget": 145})


# ---- bad rows ------------------------------------------------------------------------------------------------------

GOOD = {"image": "good.png", "question": "What color is the circle?"}
INSTRUCTION = "Answer the question using a single word or phrase."
BAD = {
    "no JSON": ("{'id': 1}", None, "not JSON"),
    "no UTF-8": ('"\\ud800', None, "not JSON"),
    "too deep": ("[" * 100_000, None, "not JSON"),
    "a list": ("[1, 2]", None, r"expected an object, got \[1, 2\]"),
    "no question": ({"image": "good.png", "id": "a"}, "a", "the question is missing or empty, got None"),
    "an empty question": ({**GOOD, "question": " \n", "id": "a"}, "a", "the question is missing or empty"),
    "a number for a question": ({**GOOD, "question": 3}, 1, "the question is missing or empty, got 3"),
    "an instruction alone": ({**GOOD, "question": INSTRUCTION}, 1, "the question is only an answer instruction"),
    "a placeholder": ({**GOOD, "question": "What is <image>?"}, 1, "the question contains <image>, the placeholder"),
    "half a pair": ({**GOOD, "question": "\ud83d?"}, 1, "the question is not valid Unicode"),
    "10,000 words": ({**GOOD, "question": "circle " * 10_000}, 1, "the prompt takes .* of the model's 512 positions"),
    "no picture": ({"question": "What?", "id": 7}, 7, "image must be the path of a picture, got None"),
    "an empty list": ({**GOOD, "image": []}, 1, "the row has no image, got an empty list"),
    "a number for a picture": ({**GOOD, "image": [3]}, 1, "image must be the path of a picture, got 3"),
    "a missing picture": ({**GOOD, "image": "7.png"}, 1, r"the picture 7\.png cannot be read: no such file"),
    "a truncated picture": ({**GOOD, "image": "half.png"}, 1, r"the picture half\.png cannot be read: "),
    "a second image that is not one": ({**GOOD, "image": ["good.png", "data.jsonl"]}, 1, "cannot identify image file"),
    "a picture of extreme proportions": (
        {**GOOD, "image": "long.png"},
        1,
        "it has 400000 x 8 pixels; the longer side",
    ),
    "PostScript": ({**GOOD, "image": "program.png"}, 1, "cannot identify image file, the formats that are read"),
    "a path that is not valid": ({**GOOD, "image": "\0"}, 1, "cannot be read: embedded null byte"),
    "a folder": ({**GOOD, "image": "."}, 1, "cannot be read: "),
    "a true id": ({**GOOD, "id": True}, None, "id must be a string or an integer, got True"),
    "a null id": ({**GOOD, "id": None}, None, "id must be a string or an integer, got None"),
    "an id that is taken": ({**GOOD, "id": 0}, 0, r"the id 0 is already the id of data\.jsonl, line 1"),
}


@pytest.fixture
def folder(rows_in, tmp_path):
    rows, pictures = rows_in
    whole = (pictures / rows[0]["image"]).read_bytes()
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (400_000, 8)).save(tmp_path / "long.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "program.png", "EPS")
    return tmp_path


def test_bad_rows_stop_nothing(folder):
    rows = [GOOD, *(row for row, _, _ in BAD.values()), GOOD]
    # Each bad row is the second of its own file but for its number, so that ids that default to it are told apart.
    found = answers(write_lines(folder / "data.jsonl", rows), folder / "out.jsonl")
    assert [line["row"] for line in found] == list(range(len(rows)))
    good = [line for line in found if "error" not in line]
    assert [line["row"] for line in good] == [0, len(rows) - 1]
    assert good[0]["answer"] == good[1]["answer"] != ""
    done = ask(folder / "data.jsonl", folder / "again.jsonl")
    assert (done.rows, done.answers, done.errors, done.new) == (len(rows), 2, len(BAD), len(rows))
    assert done.visual_tokens == 16.0


@pytest.mark.parametrize(("row", "row_id", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_says_what_is_wrong(folder, row, row_id, message):
    found = answers(write_lines(folder / "data.jsonl", [GOOD, row]), folder / "out.jsonl")
    assert set(found[1]) == {"row", "id", "error"}
    assert (found[1]["row"], found[1]["id"]) == (1, row_id)
    with pytest.raises(ValueError, match=rf"^data\.jsonl, line 2: .*{message}"):
        raise ValueError(found[1]["error"])


def test_bytes_that_are_not_text(folder):
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + b'{"question": "\xff"}\n')
    first, second = answers(path, folder / "out.jsonl")
    assert first["answer"]
    assert second["error"].startswith("data.jsonl, line 3: not JSON ('utf-8' codec")


def test_bad_rows_of_a_table(folder):
    columns = {
        "image": [b"nothing", None, (folder / "good.png").read_bytes(), b""],
        "question": ["What?", "What?", "What color is the circle?", None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    found = answers(folder / "data.parquet", folder / "out.jsonl")
    assert ["error" in line for line in found] == [True, True, False, True]
    assert found[0]["error"].startswith("data.parquet, row 0: the picture of ")
    assert found[1]["error"].startswith("data.parquet, row 1: image must be the path of a picture, got None")


def test_a_run_of_bad_rows_alone_ends(folder):
    data = write_lines(folder / "data.jsonl", [{**GOOD, "image": "7.png"}, "nothing", {**GOOD, "question": ""}])
    done = ask(data, folder / "out.jsonl")
    assert (done.answers, done.errors, done.visual_tokens) == (0, 3, None)


def test_a_file_without_any_row_is_refused(folder):
    data = write_lines(folder / "lines.jsonl", ["nothing", "nothing"])
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 1: not JSON .* No line is a valid row: write one JSON"):
        ask(data, folder / "lines.out")
    assert not list(folder.glob("lines.out*"))


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 500), (500, 1)])
def test_pictures_of_any_shape_are_answered(folder, size):
    Image.new("CMYK", size).save(folder / "odd.tif")
    found = answers(write_lines(folder / "data.jsonl", [{**GOOD, "image": "odd.tif"}, GOOD]), folder / "out.jsonl")
    assert all(line["answer"] for line in found)


@pytest.mark.parametrize(
    "fields",
    [{"position_ids": "compact"}, {"position_ids": "original"}, {"enabled": False}],
    ids=["compact", "original", "off"],
)
def test_a_prompt_ends_at_the_last_position(folder, fields):
    """Rows whose prompts take 508 to 513 of 512 positions: the last ones are errors, and answers end at the limit."""
    model, processor = demo_model()
    image = Image.open(folder / "good.png").convert("RGB")

    def length_of(count):
        inputs = processor(images=image, text=build_prompt(processor, "Is a" + " red" * count, 1), return_tensors="pt")
        cut = 128 if "compact" in fields.values() else 0  # 16 of 144 tokens are left
        return inputs["input_ids"].shape[1] - cut

    first = 508 - length_of(0)  # each word is one token
    taken = {length_of(count): count for count in range(first, first + 6)}
    assert list(taken) == list(range(508, 514))
    rows = [{**GOOD, "question": "Is a" + " red" * count} for count in taken.values()]
    data = write_lines(folder / "data.jsonl", [GOOD, *rows])
    first, *found = answers(data, folder / "out.jsonl", token_recovery=fields, max_new_tokens=6)
    assert first["answer"]
    for length, row, line in zip(taken, rows, found, strict=True):
        if length >= 512:
            assert f"the prompt takes {length} of the model's 512 positions" in line["error"]
            continue
        inputs = processor(images=image, text=build_prompt(processor, row["question"], 1), return_tensors="pt")
        ids = model.generate(**inputs, token_recovery=fields, max_new_tokens=min(6, 512 - length), do_sample=False)
        ids = ids[0, inputs["input_ids"].shape[1] :]
        assert line["answer"] == processor.decode(ids, skip_special_tokens=True).strip()


def test_data_that_cannot_be_read_is_refused(folder):
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (folder / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    for name, message in (
        ("broken.parquet", r"broken\.parquet cannot be read as a Parquet file"),
        ("empty.jsonl", "holds no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(folder / name, folder / "out.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ask(folder / "nothing", folder / "out.jsonl")
    data = write_lines(folder / "data.jsonl", [GOOD])
    refused = {" ": "missing or empty", "<image>": "contains <image>", INSTRUCTION: "only an answer instruction"}
    for asked, message in refused.items():
        with pytest.raises(ValueError, match=message):
            ask(data, folder / "out.jsonl", columns=Columns(asked=asked))
    assert not list(folder.glob("out.jsonl*"))


def test_the_data_is_not_overwritten(folder):
    data = write_lines(folder / "data.jsonl", [GOOD])
    with pytest.raises(ValueError, match="is the data itself, which would be overwritten"):
        ask(data, data)
    with pytest.raises(ValueError, match="is inside the folder of the data"):
        ask(folder, folder / "out.jsonl", columns=Columns(asked="What?"))
    with pytest.raises(ValueError, match="must be a file in a folder that exists"):
        ask(data, folder / "no" / "out.jsonl")
    for option in ("batch_size", "max_new_tokens", "limit"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            ask(data, folder / "out.jsonl", **{option: 0})
    assert read_lines(data) == [GOOD]
