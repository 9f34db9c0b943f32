"""The command line as a person meets it: help, one-line errors, and the way from stock checkpoints to answers."""

import functools
import json
import operator
import re
import shutil

import pytest
import tiny
import torch
from architectures import each_architecture
from saved import save_checkpoint
from transformers import AutoModelForImageTextToText, CLIPConfig
from transformers.utils import logging

import reccomp_hf
from reccomp_hf.checkpoints import info
from reccomp_hf.cli import COMMANDS as COMMAND_MODULES
from reccomp_hf.cli.main import main

pytest_plugins = ("command_line",)

COMMANDS = tuple(module.__name__.rpartition(".")[2] for module in COMMAND_MODULES)


# ---- help and version ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"example:\n  reccomp-hf {command}" in out
    assert "--debug" in out
    assert "None" not in out and "UNSET" not in out and "False" not in out


def test_the_main_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "example:\n  reccomp-hf demo" in out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert [line for line in out.splitlines() if line in ("try:", "make:", "measure:", "use:", "serve:")] == [
        "try:",
        "make:",
        "measure:",
        "use:",
        "serve:",
    ]


def test_no_command_prints_the_help(run):
    code, out, err = run()
    assert (code, err) == (2, "")
    assert out.startswith("usage: reccomp-hf ")


def test_version(run):
    assert run("--version") == (0, f"reccomp-hf {reccomp_hf.__version__}\n", "")


# ---- convert and info ----------------------------------------------------------------------------------------------


def test_convert_says_what_it_wrote_and_what_comes_next(run, sources, tmp_path):
    output = tmp_path / "new" / "model"
    code, out, err = run("convert", *sources, output, "--preset", "balanced", "--set", "budget=0.25")
    assert (code, err) == (0, "")
    assert out.startswith(f"Wrote {output} (preset balanced).\n")
    words = " ".join(out.split())  # lines break anywhere
    assert "budget 0.25" in words and 'text_relevance "value"' in words and "100 become 25 (25%)" in words
    assert f"reccomp-hf info {output}" in out
    assert AutoModelForImageTextToText.from_pretrained(output).config.token_recovery.budget == 0.25


def test_info(run, converted):
    code, out, err = run("info", converted)
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert ["model", "type", "llava_reccomp"] in lines
    assert ["visual", "tokens", "100 become 24 (24%)"] in lines
    assert ["recovery", "tokenizer", "present"] in lines
    assert 'budget 24, text_relevance "value"' in out


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vision_config", "model_type"), "siglip_vision_model", "Token recovery needs CLIP's class token"),
        (("token_recovery", "visual_layer"), -50, "visual_layer is -50, but the vision tower has only"),
        (("vision_feature_layer",), -1, "vision_feature_layer"),
        (("vision_config", "patch_size"), 0, "patch_size must be an int from 1 to image_size"),
        (("vision_feature_layer",), "x", "vision_feature_layer"),
    ],
)
def test_info_on_a_config_that_no_model_can_have(run, tmp_path, path, value, message):
    folder = save_checkpoint(tmp_path / "checkpoint")
    values = json.loads((folder / "config.json").read_text())
    *parents, last = path
    functools.reduce(operator.getitem, parents, values)[last] = value
    (folder / "config.json").write_text(json.dumps(values))
    code, out, err = run("info", folder)
    assert (code, out) == (2, "") and message in err and "unexpected" not in err


def test_info_as_json_agrees_with_the_model(run, converted):
    facts = json.loads(run("info", converted, "--json")[1])
    model = AutoModelForImageTextToText.from_pretrained(converted)
    assert facts["model_type"] == "llava_reccomp"
    assert facts["settings"] == {"method": "recoverable", "budget": 24, "text_relevance": "value"}
    assert facts["token_recovery"] == model.config.token_recovery.to_dict()
    assert (facts["tokens_per_image"]["before"], facts["tokens_per_image"]["after"]) == (100, 24)
    assert facts["dtypes"] == ["float32"]
    parts = {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "token_recovery": model.token_recovery.children(),  # it hides its weights from adapters
    }
    counts = {
        name: sum(parameter.numel() for module in modules for parameter in module.parameters())
        for name, modules in parts.items()
    }
    counts["language_model"] = model.num_parameters() - sum(counts.values())
    assert facts["parameters"] == {**counts, "total": model.num_parameters()}
    assert facts["files"]["weights"] == [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert facts["files"]["recovery_tokenizer"] is True


@each_architecture
def test_info_on_tokens(run, architecture, tmp_path):
    folder, patches = architecture.save_converted(tmp_path), tiny.PATCHES
    settings = {"dynamic": {"budget": None}, "count": {"budget": 8}, "share": {"budget": 0.125}}
    notes, saved = {}, json.loads((folder / "config.json").read_text())
    for name, fields in (settings | {"off": {"enabled": False}}).items():
        saved["token_recovery"] |= {"enabled": True, **fields}
        (folder / "config.json").write_text(json.dumps(saved))
        notes[name] = json.loads(run("info", folder, "--json")[1])["tokens_per_image"]
    assert "image and the question" in notes["dynamic"]["note"] and notes["dynamic"]["after"] is None
    assert notes["count"]["after"] == 8
    assert "enabled is false" in notes["off"]["note"] and notes["off"]["before"] == notes["off"]["after"]
    if architecture.name == "llava":
        assert {note["before"] for note in notes.values()} == {patches}
        assert notes["share"]["after"] == 13  # 12.5 rounds up
    else:
        assert all("per tile" in note["note"] for note in notes.values())
        assert "newline" in notes["count"]["note"] and "12% of them" in notes["share"]["note"]


def test_visual_only_needs_no_clip(run, error, sources, tmp_path):
    assert "CLIP is missing" in error("convert", sources[0], tmp_path / "a")
    code, out, _ = run("convert", sources[0], tmp_path / "a", "--visual-only")
    assert code == 0 and "none: visual only" in out
    facts = json.loads(run("info", tmp_path / "a", "--json")[1])
    assert facts["parameters"]["token_recovery"] == 0
    assert facts["token_recovery"]["text_encoder_config"] is None
    assert "none is needed" in run("info", tmp_path / "a")[1]
    assert run("convert", *sources, tmp_path / "b", "--visual-only")[0] == 0
    assert json.loads(run("info", tmp_path / "b", "--json")[1])["parameters"] == facts["parameters"]


def test_info_counts_as_the_method_does(run, error, converted, tmp_path):
    shutil.copy(converted / "config.json", tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(converted)
    inputs = {
        "input_ids": torch.full((1, 100), model.config.image_token_id),
        "pixel_values": torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE),
    }
    for budget in (0.07, 0.26):  # 7 and 26 of 100 patches, which are no cells of a grid
        fields = {"method": "pooling", "budget": budget}
        (tmp_path / "config.json").write_text(json.dumps({**saved, "token_recovery": fields}))
        after = json.loads(run("info", tmp_path, "--json")[1])["tokens_per_image"]["after"]
        assert [after] == model.recover(**inputs, token_recovery=fields)[0].counts.tolist() != [round(100 * budget)]
    (tmp_path / "config.json").write_text(json.dumps({**saved, "token_recovery": {"budget": 101}}))
    assert "token_recovery.budget is 101, but an image has only 100 patches" in error("info", tmp_path)


def test_info_tells_when_the_recovery_tokenizer_is_missing(run, converted, tmp_path):
    for path in (converted / "config.json", *converted.glob("model*")):
        shutil.copy(path, tmp_path)
    assert "MISSING" in run("info", tmp_path)[1]


def test_info_without_weights(run, converted, tmp_path):
    (tmp_path / "config.json").write_bytes((converted / "config.json").read_bytes())
    code, out, _ = run("info", tmp_path)
    assert code == 0 and "no safetensors files" in out


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "budgt=3"], "unknown token_recovery field 'budgt'; did you mean 'budget'"),
        (["--set", "budget=many"], "token_recovery.budget must be .*, got 'many'"),
        (["--set", "budget=101"], "token_recovery.budget is 101, but an image has only 100 patches"),
        (["--set", "processor=1"], "unknown token_recovery field 'processor'"),
        (["--set", "preset=1"], "unknown token_recovery field 'preset'"),
        (["--set", "budget"], "expected field=value, got 'budget'"),
        (["--preset", "best"], "invalid choice: 'best' .*paper"),
    ],
)
def test_convert_names_the_setting_that_is_wrong(error, sources, tmp_path, options, message):
    assert re.search(message, error("convert", *sources, tmp_path / "out", *options))
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(error, sources, converted):
    before = sorted(converted.iterdir())
    assert "is not an empty folder" in error("convert", *sources, converted)
    assert sorted(converted.iterdir()) == before


def test_sources_that_do_not_fit_are_refused(error, sources, tmp_path):
    assert "llava must be of model_type" in error("convert", sources[1], sources[1], tmp_path / "out")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    assert "does not fit" in error("convert", sources[0], tmp_path / "clip", tmp_path / "out")


def test_info_refuses_what_is_not_ours(error, sources, tmp_path):
    stock, clip = sources
    assert f"stock LLaVA (model_type 'llava') without token recovery: `reccomp-hf convert {stock} " in error(
        "info", stock
    )
    assert "not a compressed LLaVA: its model_type is 'clip'" in error("info", clip)
    assert "no config.json" in error("info", tmp_path)
    assert "is a file; name the folder" in error("info", stock / "config.json")
    assert "somebody/no-such-model is not a folder" in error("info", "somebody/no-such-model")


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(run, tmp_path, place):
    arguments = ["info", tmp_path]
    code, _, err = run(*(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]))
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("reccomp-hf: error: ")


def test_an_unexpected_error_is_one_line_that_says_so(error, monkeypatch, tmp_path):
    def broken(*_):
        raise KeyError("first\nsecond")

    monkeypatch.setattr(info, "describe", broken)
    assert error("info", tmp_path).startswith("unexpected KeyError: ")


def test_interruption_is_no_traceback(run, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupted)
    assert run("info", tmp_path) == (130, "", "reccomp-hf: interrupted\n")


def test_commands_leave_the_logging_settings_as_they_were(run, error, converted):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    run("info", converted)
    error("demo", "--budget", "0")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_an_unknown_option_points_at_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "one", "two", "--clip", "three"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "reccomp-hf: error: unrecognized arguments: --clip three (see reccomp-hf convert --help)\n"
    )


# ---- names and files that are nearly right -------------------------------------------------------------------------


def test_a_misspelt_shipped_checkpoint_is_not_looked_for_on_the_hub(error):
    for command in (("info",), ("cost",), ("eval",), ("card", "--stdout")):
        assert "There is no folder dmeo; did you mean 'demo'? It comes with this package." in error(*command, "dmeo")
    assert "did you mean 'demo-global'" in error("info", "demo-globl")


def test_the_card_of_a_shipped_checkpoint_is_printed_and_not_written(run, error):
    folder = reccomp_hf.demo.checkpoint_folder("demo")
    before = (folder / "README.md").read_bytes()
    assert "demo is shipped with this package and has its card: --stdout prints one" in error("card", "demo")
    code, out, err = run("card", "demo", "--stdout", "--no-measure")
    assert (code, err) == (0, "") and out.startswith("---\n") and "token_recovery" in out
    assert (folder / "README.md").read_bytes() == before


def test_a_picture_given_as_data_is_named_as_one(error, tmp_path):
    tiny.pictures(1)[0].save(tmp_path / "photo.png")
    assert "photo.png is a picture, expected questions" in error("eval", "demo", "--data", tmp_path / "photo.png")


def test_eval_on_one_image_prints_no_interval(run):
    code, out, _ = run("eval", "demo", "--limit", "1", "--settings", "off,balanced:0.1")
    assert code == 0 and out.startswith("demo: 1 question on 1 image (demo); intervals need more than one image\n")
    assert "[" not in out
    code, out, _ = run("eval", "demo", "--limit", "12", "--settings", "off")
    assert "12 questions on 2 images (demo); 95 % intervals" in out and "[" in out


def test_convert_says_what_share_of_a_small_grid_remains(run, sources, tmp_path):
    settings = ("--preset", "balanced", "--dry-run")
    _, out, _ = run("convert", *sources, tmp_path / "a", *settings)
    assert "64 of 100 tokens are 64% of an image; --set budget=0.11 keeps about a tenth" in " ".join(out.split())
    for budget in ("budget=12", "budget=0.5"):  # small, and chosen as a share
        assert "hint" not in run("convert", *sources, tmp_path / "a", *settings, "--set", budget)[1]
