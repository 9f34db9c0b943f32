"""Converting publishes nothing that is not whole and proven, and leaves nothing behind where it fails."""

import json
import os
import shutil
import signal

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT
from conversions import (
    CONVERT,
    INDEX,
    LLM,
    assert_nothing_new,
    copies,
    each_of,
    leave_cards_unmeasured,
    rewrite,
    shard_with,
    sharded,
)
from safetensors.torch import load_file

import reccomp_hf
from reccomp_hf.checkpoints.conversion import shards
from reccomp_hf.checkpoints.conversion_record import ConversionRecord
from reccomp_hf.checkpoints.work_folder import work_folder
from reccomp_hf.cli import main as cli


@pytest.fixture(autouse=True)
def unmeasured_cards(monkeypatch):
    leave_cards_unmeasured(monkeypatch)


@pytest.fixture
def sources(tmp_path):
    return copies(tmp_path / "sources")


# ---- what is refused -----------------------------------------------------------------------------------------------


def lose(tensors, key=LLM):
    tensors.pop(key)


def widen(tensors):
    tensors[LLM] = torch.zeros(65, 32)


def add(tensors):
    tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(64, 32)


def drop_from_index(folder, key):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][key]
    (folder / INDEX).write_text(json.dumps(index))


SPOILT = {
    "missing shard": (lambda f: shard_with(f, LLM).unlink(), "lacks 1 of its weight files, model-0"),
    "truncated": (lambda f: os.truncate(shard_with(f, LLM), 5000), r"cannot be read .* truncated"),
    "no safetensors": (lambda f: shard_with(f, LLM).write_text("oops"), r"cannot be read .* truncated"),
    "index lies": (lambda f: rewrite(shard_with(f, LLM), lose), "lacks weights that the index puts there, language_m"),
    "key missing": (
        lambda f: (rewrite(shard_with(f, LLM), lose), drop_from_index(f, LLM)),
        r"not a complete LlavaForCond\w+: 1 weights are missing, language_model\.layers\.1\.mlp\.up_proj",
    ),
    "key too many": (
        lambda f: rewrite(shard_with(f, LLM), add),
        r"holds 1 weights that .* has no place for, language",
    ),
    "other shape": (lambda f: rewrite(shard_with(f, LLM), widen), r"has shape \(65, 32\), but its config asks for"),
    "twice": (
        lambda f: rewrite(shard_with(f, "language_model.lm_head.weight"), widen),
        "twice, once in .*the shards contradict",
    ),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("model*")],
        r"has no weights: neither model\*\.safetensors nor",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_llava_that_is_not_whole_is_refused(spoil, message, sources, tmp_path):
    spoil(sources[0])
    with pytest.raises((ValueError, OSError), match=message):
        reccomp_hf.convert(*sources, tmp_path / "out")
    assert_nothing_new(tmp_path, "sources")


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(
    "fields", [{"vision_feature_layer": [-2, -3]}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_features_that_cannot_be_compressed_are_refused(fields, enabled, sources, tmp_path):
    """Even for a checkpoint that begins switched off: nobody could switch it on."""
    path = sources[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=rf"{next(iter(fields))} must be"):
        reccomp_hf.convert(*sources, tmp_path / "out", enabled=enabled)
    assert_nothing_new(tmp_path, "sources")


def test_a_clip_without_its_text_side_is_refused(sources, tmp_path):
    rewrite(sources[1] / "model.safetensors", lambda tensors: tensors.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match=r"not a complete CLIPModel: it has no weights visual_projection\.\*"):
        reccomp_hf.convert(*sources, tmp_path / "out")
    assert_nothing_new(tmp_path, "sources")


def test_a_clip_whose_text_side_has_holes_is_refused(sources, tmp_path):
    key = "text_model.encoder.layers.1.mlp.fc1.bias"
    rewrite(sources[1] / "model.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=rf"1 weights are missing, token_recovery\.text_encoder\.{key}"):
        reccomp_hf.convert(*sources, tmp_path / "out")
    assert_nothing_new(tmp_path, "sources")


def test_a_value_that_the_dtype_cannot_hold_is_refused(sources, tmp_path):
    rewrite(shard_with(sources[0], LLM), lambda tensors: tensors[LLM].fill_(1e6))
    with pytest.raises(ValueError, match=r"up_proj\.weight has values that torch\.float16 cannot hold; use bfloat16"):
        reccomp_hf.convert(*sources, tmp_path / "out", dtype="float16")
    assert_nothing_new(tmp_path, "sources")
    reccomp_hf.convert(*sources, tmp_path / "out", dtype="bfloat16")


def test_a_full_disk_is_reported_before_anything_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(CONVERT.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 300_000))
    monkeypatch.setattr(shards, "copy_shard", lambda *_: pytest.fail("copied"))
    with pytest.raises(OSError, match=r"has 0\.0 GB free; the checkpoint needs 0\.0 GB"):
        reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out")
    assert_nothing_new(tmp_path)


# ---- the verification: whatever goes wrong on the way is detected --------------------------------------------------


def spoil_copies(monkeypatch, change, checked=False):
    """Let a change happen to every shard while it is copied; unless `checked`, let the comparison of bytes miss it."""
    copy = shards.copy_shard

    def copy_and_spoil(source, target, dtype, progress):
        copy(source, target, dtype, progress)
        change(target)

    monkeypatch.setattr(shards, "copy_shard", copy_and_spoil)
    if not checked:
        monkeypatch.setattr(shards, "check_copy", lambda *_: None)


def add_to(piece):
    def change(path):
        if any(piece in key for key in load_file(path)):
            rewrite(path, lambda tensors: [value.add_(0.05) for key, value in tensors.items() if piece in key])

    return change


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_bit_that_flips_on_the_way_is_found(dtype, tmp_path, monkeypatch):
    spoil_copies(monkeypatch, flip_a_bit, checked=True)
    with pytest.raises(RuntimeError, match=r"model-00001-of-\d+\.safetensors differs from .*the disk or the memory"):
        reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out", dtype=dtype)
    assert_nothing_new(tmp_path)


@each_of(
    "architecture, piece, part",
    (LLAVA, "encoder.layers.1.mlp.fc2.bias", "vision tower"),
    (LLAVA_NEXT, "encoder.layers.3.mlp.fc2.bias", "last block of the vision"),
)
def test_a_swapped_vision_tower_is_detected(architecture, piece, part, tmp_path, monkeypatch):
    spoil_copies(monkeypatch, add_to(piece))
    with pytest.raises(RuntimeError, match=f"does not compute the same as its sources: the {part}"):
        reccomp_hf.convert(*sharded(architecture), tmp_path / "out")
    assert_nothing_new(tmp_path)


def test_a_swapped_projector_is_detected(tmp_path, monkeypatch):
    spoil_copies(monkeypatch, add_to("multi_modal_projector.linear_1.bias"))
    with pytest.raises(RuntimeError, match="the projector differs by"):
        reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out")


def test_a_lost_layer_of_the_language_model_is_found(tmp_path, monkeypatch):
    def change(path):
        if LLM in load_file(path):
            rewrite(path, lose)

    spoil_copies(monkeypatch, change)
    with pytest.raises(ValueError, match=r"the new checkpoint is not a complete Llava.*: 1 weights are missing"):
        reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out")


@pytest.mark.parametrize("piece", ["text_model.final_layer_norm.bias", "visual_projection"])
def test_a_swapped_text_side_is_detected(piece, tmp_path, monkeypatch):
    read = shards.text_side_tensors

    def read_and_spoil(*arguments):
        generator = torch.Generator().manual_seed(0)
        return {
            key: value + 0.1 * torch.randn(value.shape, generator=generator) if piece in key else value
            for key, value in read(*arguments).items()
        }

    monkeypatch.setattr(shards, "text_side_tensors", read_and_spoil)
    with pytest.raises(RuntimeError, match="the text similarity differs by"):
        reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out")


@each_of("architecture, budget", (LLAVA, 9), (LLAVA_NEXT, 0.25), (LLAVA, None))
def test_a_wrong_number_of_tokens_is_found(architecture, budget, tmp_path, monkeypatch):
    recover = architecture.model_class.recover

    def recover_fewer(*arguments, **inputs):
        records = recover(*arguments, **inputs)
        records[0].counts[0] -= 1
        return records

    monkeypatch.setattr(architecture.model_class, "recover", recover_fewer)
    with pytest.raises(RuntimeError, match=r"chooses \d+ of \d+ visual tokens, not \d+"):
        reccomp_hf.convert(*sharded(architecture), tmp_path / "out", budget=budget)


def test_a_swapped_tokenizer_is_detected(tmp_path, monkeypatch):
    save = LLAVA.processor_class.save_pretrained

    def save_another(self, folder, **kwargs):
        save(self, folder, **kwargs)
        path = folder / "recovery_tokenizer" / "tokenizer.json"
        fields = json.loads(path.read_text())
        fields["model"]["merges"] = fields["model"]["merges"][:1]
        path.write_text(json.dumps(fields))

    monkeypatch.setattr(LLAVA.processor_class, "save_pretrained", save_another)
    with pytest.raises(RuntimeError, match="The saved recovery_tokenizer encodes a prompt differently"):
        reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out")
    assert_nothing_new(tmp_path)


@each_of("architecture, preset", (LLAVA, "paper"), (LLAVA, "authors"), (LLAVA_NEXT, "balanced"))
def test_what_was_proven_is_said(architecture, preset, tmp_path):
    fields = {"budget": 20} if preset == "balanced" else {}
    proof = ConversionRecord.read(reccomp_hf.convert(*sharded(architecture), tmp_path / "out", preset, **fields)).proof
    assert "weight files of LLaVA byte for byte; vision tower, projector, text similarity equal" in proof
    assert ("20 of " if preset == "balanced" else " visual tokens chosen on a probe image") in proof


# ---- interrupted in the middle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_conversion_that_is_stopped_leaves_nothing(name, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def stop(path):
        if "00003" in path.name:
            signal.raise_signal(getattr(signal, name))

    spoil_copies(monkeypatch, stop, checked=True)
    try:
        assert cli.main(["convert", *map(str, sharded(LLAVA)), str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert capsys.readouterr().err == "reccomp-hf: interrupted\n"
    assert_nothing_new(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_killed_conversion_left_is_not_used(tmp_path, caplog):
    left = tmp_path / ".out-abc.converting"
    (left / "new" / "out").mkdir(parents=True)
    (left / "new" / "out" / "model.safetensors").write_text("half")
    folder = reccomp_hf.convert(*sharded(LLAVA), tmp_path / "out")
    assert f"{left} was left by a run that was killed; it is removed" in caplog.text
    assert not (folder / "model.safetensors").exists()
    assert_nothing_new(tmp_path, "out")


def test_the_folder_of_a_running_conversion_stays(tmp_path, caplog):
    with work_folder(tmp_path / "out") as running:
        with work_folder(tmp_path / "out") as work:
            assert running.is_dir() and work != running
        assert f"{running} belongs to another run, which may still be at work" in caplog.text and running.is_dir()
    assert_nothing_new(tmp_path)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12; the child runs no thread
def test_what_a_killed_process_left_is_removed(tmp_path, caplog):
    child = os.fork()
    if not child:
        try:
            with work_folder(tmp_path / "out"):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    [left] = tmp_path.iterdir()
    (left / "weights").write_text("half")
    (tmp_path / ".out-mine").mkdir()
    (tmp_path / ".out-link.unfinished").symlink_to(tmp_path / ".out-mine")
    with work_folder(tmp_path / "out"):
        assert not left.exists()
    assert f"{left} was left by a run that was killed" in caplog.text
    assert_nothing_new(tmp_path, ".out-mine", ".out-link.unfinished")


def test_an_output_that_a_rename_cannot_replace(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for output in (".", tmp_path / "empty", tmp_path / "link"):
        with pytest.raises(FileExistsError, match="is a link, a mount point or the current folder"):
            reccomp_hf.convert(*sharded(LLAVA), output)
    assert_nothing_new(tmp_path, "empty", "link")
