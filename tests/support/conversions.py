"""Sources to convert in many files, and what the tests of converting share."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny
from architectures import LLAVA
from safetensors.torch import load_file, save_file

import reccomp_hf
from reccomp_hf.checkpoints import convert as CONVERT

INDEX = "model.safetensors.index.json"
LLM = "language_model.model.layers.1.mlp.up_proj.weight"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    **tiny._text_ids(),
}
"""A language model."""
_FOLDER = tempfile.TemporaryDirectory(prefix="reccomp-hf-tests-")  # gone when the process ends


@functools.cache
def sharded(architecture):
    """Folders of a LLaVA in many files and of its CLIP; tests that change them copy them."""
    stock, clip = architecture.save_sources(Path(_FOLDER.name, architecture.name))
    shutil.rmtree(stock)
    architecture.stock().save_pretrained(stock, max_shard_size="60KB")
    architecture.stock_processor().save_pretrained(stock)
    return stock, clip


@functools.cache
def converted(architecture):
    """What becomes of them; not to be changed."""
    return reccomp_hf.convert(*sharded(architecture), Path(_FOLDER.name, f"{architecture.name}-converted", "out"))


def copies(folder):
    """Copies of LLaVA-1.5's, to be spoiled."""
    return tuple(shutil.copytree(source, folder / source.name) for source in sharded(LLAVA))


def leave_cards_unmeasured(monkeypatch):
    """The tokens that a card counts are counted in its own tests."""
    monkeypatch.setattr(CONVERT, "write_card", functools.partial(CONVERT.write_card, measure=False))


def each_of(names, *rows):
    """A test's parameters, row by row, the first one an architecture; the product of all would say no more."""
    return pytest.mark.parametrize(
        names, rows, ids=["-".join(str(getattr(v, "name", getattr(v, "__name__", v))) for v in row) for row in rows]
    )


def weights_of(folder):
    """All tensors of a folder by their keys."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def shard_with(folder, key):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def rewrite(path, change):
    """Change the tensors of a file by a function of their dictionary."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_nothing_new(folder, *known):
    assert {path.name for path in folder.iterdir()} == set(known)
