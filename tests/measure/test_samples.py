"""Questions from files and folders: read as they are written, and refused with the row's number where they are not."""

import json

import pytest
import tiny
from PIL import Image

from reccomp_hf.cli import main as cli
from reccomp_hf.measure.evaluation import load_samples

PICTURES = tiny.pictures(3)


@pytest.fixture
def data(tmp_path):
    """Write rows as JSON lines beside three pictures; returns the file."""
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])

    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "data.jsonl"

    return write


def row(**fields):
    return {"image": "0.png", "question": "What is it?", "answers": ["a square", "square"], **fields}


def test_lines_are_read(data):
    plain = row(image="1.png", answers="yes")
    alone = {"image": "0.png", "question": " Is it? ", "answer": "no"}
    samples = load_samples(data(row(kind="what"), "", plain, alone))
    assert [sample.picture for sample in samples] == ["0.png", "1.png", "0.png"]
    assert [sample.question for sample in samples] == ["What is it?", "What is it?", "Is it?"]
    assert [sample.answers for sample in samples] == [("a square", "square"), ("yes",), ("no",)]
    assert [sample.kind for sample in samples] == ["what", "all", "all"]
    assert samples[1].open().tobytes() == PICTURES[1].tobytes()
    assert len(load_samples(data(row(), row(), row(image="missing.png")), limit=2)) == 2


BROKEN = {
    "no question": ({"question": "  "}, "line 2: the question is missing or empty, got '  '"),
    "question of a wrong type": ({"question": 3}, "line 2: the question is missing or empty, got 3"),
    "no answers": ({"answers": []}, r"line 2: answers must be a list of strings, not an empty one, got \[\]"),
    "answers of a wrong type": ({"answers": [1]}, "line 2: answers must be a list of strings"),
    "no picture": ({"image": None}, "line 2: image must be the path of a picture, got None"),
    "missing picture": ({"image": "7.png"}, "line 2: the picture 7.png cannot be read: no such file"),
    "truncated picture": ({"image": "half.png"}, "line 2: the picture half.png cannot be read: "),
    "no picture at all": ({"image": "data.jsonl"}, "cannot be read: cannot identify image file"),
}


@pytest.mark.parametrize(("fields", "message"), BROKEN.values(), ids=BROKEN)
def test_a_row_that_cannot_be_used_is_named(data, fields, message):
    with pytest.raises(ValueError, match=message):
        load_samples(data(row(), row(**fields)))


def test_lines_that_are_no_objects(data, tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: not JSON"):
        load_samples(data(row(), "", "{'image': 1}"))
    with pytest.raises(ValueError, match="line 1: expected an object"):
        load_samples(data("[1, 2]"))
    with pytest.raises(ValueError, match="holds no rows"):
        load_samples(data(""))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_samples(tmp_path / "nothing.jsonl")


def test_the_command_refuses_data_in_one_line(data, capsys):
    path = data(row(), row(question=""))
    assert cli.main(["eval", "demo", "--data", str(path)]) == 2
    assert capsys.readouterr() == (
        "",
        "reccomp-hf: error: data.jsonl, line 2: the question is missing or empty, got ''.\n",
    )
    for arguments, message in (
        (["--settings", "visual"], "needs a budget"),
        (["--settings", "text:4", "--compare", "text:4", "text:5"], "--compare names 'text:5', which is not among"),
        (["--data", str(path), "--skip", "3"], "--skip passes over drawn scenes"),
    ):
        assert cli.main(["eval", "demo", *arguments]) == 2
        assert message in capsys.readouterr().err
    for arguments, message in (
        (["--limit", "0"], "--limit: expected a whole number of at least 1, got '0'"),
        (["--plot", str(path)], "expected a file that ends in .png"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["eval", "demo", *arguments])
        assert message in capsys.readouterr().err


# ---- folders of the datasets library -------------------------------------------------------------------------------

datasets = pytest.importorskip("datasets")


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def columns(**fields):
    whole = {"image": PICTURES, "question": ["One?", "Two?", "Three?"], "answers": [["1"], ["2", "two"], ["3"]]}
    return {**whole, **fields}


@pytest.mark.usefixtures("quiet_datasets")
def test_a_saved_dataset_is_read(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
        }
    )
    data = datasets.Dataset.from_dict(columns(image=[*PICTURES[:2], PICTURES[0]]), features=features)
    data.save_to_disk(tmp_path / "saved")
    samples = load_samples(tmp_path / "saved")
    assert [sample.question for sample in samples] == ["One?", "Two?", "Three?"]
    assert samples[1].answers == ("2", "two")
    assert samples[1].open().tobytes() == PICTURES[1].tobytes()
    assert samples[0].picture == samples[2].picture != samples[1].picture  # questions on one picture
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "one_split")
    assert len(load_samples(tmp_path / "one_split", limit=2)) == 2
    datasets.DatasetDict({"test": data, "train": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits test, train; name the folder of one"):
        load_samples(tmp_path / "splits")
    assert len(load_samples(tmp_path / "splits" / "test")) == 3


@pytest.mark.usefixtures("quiet_datasets")
def test_rows_of_a_dataset_that_cannot_be_used_are_named(tmp_path):
    datasets.Dataset.from_dict(columns(question=["One?", "", "Three?"])).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty, row 1: the question is missing or empty"):
        load_samples(tmp_path / "empty")
    broken = [{"bytes": b"nothing", "path": None}] * 3
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(columns(image=broken), features=features).save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"broken, row 0: the picture .* cannot be read"):
        load_samples(tmp_path / "broken")
    datasets.Dataset.from_dict({"image": PICTURES, "text": ["a", "b", "c"]}).save_to_disk(tmp_path / "columns")
    with pytest.raises(ValueError, match="has no column 'question'; its columns are image, text"):
        load_samples(tmp_path / "columns")


@pytest.mark.usefixtures("quiet_datasets")
def test_an_image_folder_is_read(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, picture in enumerate(PICTURES):
        picture.save(folder / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "question": f"{n}?", "answers": [str(n)], "kind": "number"} for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    samples = load_samples(folder)
    assert [(sample.question, sample.answers, sample.kind) for sample in samples] == [
        (f"{n}?", (str(n),), "number") for n in range(3)
    ]
    assert [sample.open().tobytes() for sample in samples] == [picture.tobytes() for picture in PICTURES]
    assert isinstance(samples[0].open(), Image.Image)
