"""Saved checkpoints: loading, comparing with stock, and the fixtures that each transformers line wrote."""

import shutil
import zipfile

import numpy as np
import tiny
import torch
import transformers
from architectures import ARCHITECTURES, LLAVA, generate, prompt_of
from paths import DATA
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from reccomp_hf.core.questions import lengthened

LINE = f"{transformers.__version__.partition('.')[0]}x"
PARTS = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
OLDER = {"llava": "checkpoint_5x", "llava_next": "checkpoint_4x"}
"""Architecture -> folder of the weights that go with its code in `data/older_code.zip`."""
FIXTURE_SETTINGS = {"dynamic": {}, "budget": {"budget": 20, "text_relevance": "value"}}


def save_checkpoint(folder, architecture=LLAVA, shard="5GB", **fields):
    """A compressed checkpoint with its processor, as `save_pretrained` writes them; returns the folder."""
    model = architecture.build(**fields) if fields else architecture.compressed()
    model.save_pretrained(folder, max_shard_size=shard)
    architecture.processor().save_pretrained(folder)
    return folder


def older_checkpoint(architecture, folder):
    """A checkpoint with the code of an older layout; returns the folder.

    `data/older_code.zip` holds the files that `write_remote_code` of commit 169088b wrote into
    `data/checkpoint_5x/llava` and `data/checkpoint_4x/llava_next`: code side by side, most of it without a suffix.
    """
    source = DATA / OLDER[architecture.name] / architecture.name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("expected.safetensors"))
    with zipfile.ZipFile(DATA / "older_code.zip") as archive:
        for name in archive.namelist():
            if name.startswith(f"{architecture.name}/"):
                (folder / name.partition("/")[2]).write_bytes(archive.read(name))
    return folder


def load(auto_class, folder):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def part_of(name):
    """The part of the model that a weight belongs to."""
    return next((part for part in PARTS if part in name), name)


def assert_bit_equal(ours, stock, parts=PARTS):
    weights, wanted = ours.state_dict(), stock.state_dict()
    names = [name for name in wanted if part_of(name) in parts]
    assert {part_of(name) for name in names} == set(parts)
    for name in names:
        assert torch.equal(weights[name], wanted[name]), name


def fixture_inputs(processor):
    """A prompt about a picture of the size that the vision tower reads."""
    size = tiny.IMAGE_SIZE
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (size, size, 3), dtype=np.uint8))
    return processor(images=picture, text=prompt_of(tiny.SENTENCES[1], 1), return_tensors="pt")


def fixture_values(folder):
    """Answers of a saved checkpoint under the installed transformers."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = fixture_inputs(AutoProcessor.from_pretrained(folder))
    with torch.no_grad():
        outputs = {name: model(**batch, token_recovery=setting) for name, setting in FIXTURE_SETTINGS.items()}
    logits = {name: output.logits[:, -8:].clone() for name, output in outputs.items()}
    ids, mask = batch["recovery_input_ids"], batch["recovery_attention_mask"]
    whole = lengthened(ids, 77)  # as earlier versions padded them
    prompt = {
        "input_ids": batch["input_ids"],
        "recovery_input_ids": whole,
        "recovery_attention_mask": torch.nn.functional.pad(mask, (0, 77 - ids.shape[-1])),
    }
    return {**prompt, **logits, "ids": generate(model, batch)}


def write_fixture():
    """Write `data/checkpoint_<line>/<architecture>`, to be run under each transformers line.

    PYTHONPATH=.:tests/support python -c "import saved; saved.write_fixture()"
    """
    for architecture in ARCHITECTURES:
        folder = DATA / f"checkpoint_{LINE}" / architecture.name
        model = architecture.build().half()
        model.save_pretrained(folder)
        architecture.processor().save_pretrained(folder)
        save_file(fixture_values(folder), folder / "expected.safetensors")
