"""The weight files of a folder are those that transformers would load."""

import json

import pytest
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from reccomp_hf.checkpoints.weight_files import WeightFiles, shard_names

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
    ("text", "message"), [("{", "index.json is not valid JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_a_damaged_index(text, message, tmp_path):
    (tmp_path / SAFE_WEIGHTS_INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        WeightFiles.find(tmp_path)


def test_names_of_shards():
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(3)[2] == "model-00003-of-00003.safetensors"
