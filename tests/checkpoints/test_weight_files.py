"""The weight files of a folder are those that transformers would load."""

import json
import re
import shutil

import pytest
from architectures import LLAVA
from conversions import converted, weights_of
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from reccomp_hf.checkpoints.completeness import check_checkpoint
from reccomp_hf.checkpoints.loading import load
from reccomp_hf.checkpoints.weight_files import WeightFiles, shard_names
from reccomp_hf.cli import main as cli

SHARDS = shard_names(2)


def write_index(folder, name, *files):
    weight_map = {f"weight.{number}": file for number, file in enumerate(files)}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file_comes_first_and_safetensors_before_pickles(tmp_path):
    found = []
    for name in (WEIGHTS_INDEX_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
        if name.endswith(".json"):
            write_index(tmp_path, name, "shard-of-" + name)
        else:
            (tmp_path / name).touch()
        files = WeightFiles.find(tmp_path)
        found.append((files.names, files.safetensors, files.complete))
    assert found == [
        (["shard-of-" + WEIGHTS_INDEX_NAME], False, False),
        ([WEIGHTS_NAME], False, True),
        (["shard-of-" + SAFE_WEIGHTS_INDEX_NAME], True, False),
        ([SAFE_WEIGHTS_NAME], True, True),
    ]


def test_shards_are_those_of_the_index(tmp_path):
    write_index(tmp_path, SAFE_WEIGHTS_INDEX_NAME, *SHARDS, SHARDS[0])
    for name in (SHARDS[1], "model-00001-of-00009.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    files = WeightFiles.find(tmp_path)
    assert files.keys == {SHARDS[0]: {"weight.0", "weight.2"}, SHARDS[1]: {"weight.1"}}
    assert (files.present, files.missing, files.complete) == ([tmp_path / SHARDS[1]], [SHARDS[0]], False)
    assert files.describe_missing() == f"1 of its weight files, {SHARDS[0]} among them"
    (tmp_path / SHARDS[0]).touch()
    assert WeightFiles.find(tmp_path).complete


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()  # which no index names
    files = WeightFiles.find(tmp_path)
    assert (files.names, files.present, files.missing) == ([], [], [])
    assert not files.safetensors and not files.complete


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "index.json is not valid JSON"),
        ("{", "index.json is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "index.json names no weights: its weight_map is None"),
        ('{"weight_map": {}}', "index.json names no weights"),
        ('{"weight_map": ["a"]}', "index.json names no weights"),
        ('{"weight_map": {"a": "../a.safetensors"}}', r"names '\.\./a\.safetensors', which is not a file"),
        ('{"weight_map": {"a": 1}}', "names 1, which is not a file"),
        ('{"weight_map": {"a": ".a.safetensors"}}', "names '.a.safetensors', which is not a file"),
    ],
)
def test_a_damaged_index(text, message, tmp_path):
    (tmp_path / SAFE_WEIGHTS_INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        WeightFiles.find(tmp_path)


def test_names_of_shards():
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(3)[2] == "model-00003-of-00003.safetensors"


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "garbage": (
        lambda path: path.write_text("<html>not found</html>"),
        "cannot be read",
    ),
    "no tensors": (lambda path: save_file({}, path), "holds no weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "recovery_tokenizer/tokenizer.json"])
def test_a_damaged_file_is_named(name, damage, tmp_path, capsys):
    change, message = DAMAGES[damage]
    if name.endswith(".json") and damage == "no tensors":
        change, message = lambda path: path.write_text('{"model": "oops"}'), "is not a tokenizer"
    elif name.endswith(".json"):
        message = "is not valid JSON"
    folder = shutil.copytree(converted(LLAVA), tmp_path / "model")
    weights = {key: value.clone() for key, value in weights_of(folder).items()}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / name)
    assert cli.main(["info", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(folder / name) in error and re.search(message, error)
    with pytest.raises(ValueError, match=message):
        load(str(folder), {})
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder)


def test_info_reports_a_missing_shard(tmp_path, capsys):
    folder = shutil.copytree(converted(LLAVA), tmp_path / "model")
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    assert cli.main(["info", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{folder} lacks 1 of its weight files, {missing.name} among them" in err
