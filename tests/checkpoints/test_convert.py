"""Converting says what is wrong with its sources, before anything is written."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from architectures import LLAVA, each_architecture
from conversions import leave_cards_unmeasured
from transformers import AutoModelForImageTextToText, AutoProcessor

import reccomp_hf
from reccomp_hf.checkpoints.conversion import compatibility, shards
from reccomp_hf.cli import main as cli
from reccomp_hf.measure.published import FULL_SIZE


@pytest.fixture(autouse=True)
def unmeasured_cards(monkeypatch):
    leave_cards_unmeasured(monkeypatch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of a LLaVA and of its CLIP."""
    return LLAVA.save_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def run(capsys):
    """Run `reccomp-hf convert`; returns the exit code, stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        return cli.main(["convert", *map(str, arguments)]), *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("./nowhere", "{clip}"), "./nowhere does not exist"),
        (("{llava}", "./nowhere"), "./nowhere does not exist"),
        (("{llava}", "{llava}"), "clip must be of model_type 'clip', got 'llava'"),
        (("{clip}", "{clip}"), "llava must be of model_type 'llava' or 'llava_next', got 'clip'"),
    ],
)
def test_convert_says_which_source_is_wrong(names, message, tmp_path, capsys):
    llava, clip = LLAVA.save_sources(tmp_path)
    named = [name.format(llava=llava, clip=clip) for name in names]
    code = cli.main(["convert", *named, str(tmp_path / "out")])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_authors_method_needs_a_clip(sources, tmp_path, capsys):
    assert cli.main(["convert", str(sources[0]), str(tmp_path / "out"), "--visual-only", "--preset", "authors"]) == 2
    assert "needs the question, and so a CLIP" in capsys.readouterr().err


def test_models_built_in_memory_become_a_folder_without_a_processor(tmp_path, caplog):
    stock = tiny.stock_llava()
    clip = tiny.clip_model(vision_from=stock)
    folder = reccomp_hf.convert(stock, clip, tmp_path / "bare")
    assert "gets no processor" in caplog.text
    assert not (folder / "processor_config.json").exists()
    assert AutoModelForImageTextToText.from_pretrained(folder).token_recovery is not None


def test_models_built_in_memory_take_the_processors_they_are_given(tmp_path):
    stock = tiny.stock_llava()
    clip, tokenizer = tiny.clip_model(vision_from=stock), tiny.clip_tokenizer()
    folder = reccomp_hf.convert(
        stock, clip, tmp_path / "whole", processor=tiny.stock_processor(), clip_tokenizer=tokenizer
    )
    assert (
        AutoProcessor.from_pretrained(folder).recovery_tokenizer("red")["input_ids"] == tokenizer("red")["input_ids"]
    )


def test_a_clip_that_the_tower_does_not_come_from_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"does not come from this CLIP: the mean cosine of their weights is -?0\.\d\d"
    ):
        reccomp_hf.convert(tiny.stock_llava(), tiny.clip_model(seed=5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_tower_is_a_warning(tmp_path, caplog):
    stock = tiny.stock_llava()
    clip = tiny.clip_model(vision_from=stock)
    with torch.no_grad():
        next(clip.vision_model.parameters()).add_(0.01)
        clip.vision_model.post_layernorm.weight.add_(0.01)  # vectors are not compared
        for name, weight in clip.vision_model.named_parameters():
            if name.endswith("fc1.weight"):
                weight.add_(0.02 * torch.randn_like(weight) * weight.std())
    reccomp_hf.convert(stock, clip, tmp_path / "tuned")
    assert "was fine-tuned" in caplog.text
    assert "mean cosine of their weights 0.99" in caplog.text or "weights 1.0000" in caplog.text


def test_the_text_encoder_follows_from_the_clip(tmp_path):
    with pytest.raises(ValueError, match="text_encoder_config follows from clip"):
        reccomp_hf.convert(tiny.stock_llava(), tiny.clip_model(), tmp_path / "out", text_encoder_config=None)


# ---- the CLIP is guessed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((1024, 14, 336, 24), "openai/clip-vit-large-patch14-336"),
        ((1024, 14, 224, 24), "openai/clip-vit-large-patch14"),
        ((768, 32, 224, 12), "openai/clip-vit-base-patch32"),
        ((768, 16, 224, 12), "openai/clip-vit-base-patch16"),
    ],
)
def test_the_clip_follows_from_the_sizes_of_the_tower(sizes, name):
    fields = dict(zip(compatibility.SIZES, sizes, strict=True), model_type="clip_vision_model")
    assert compatibility.guess_clip(SimpleNamespace(**fields)) == name
    with pytest.raises(ValueError, match="CLIP is missing"):
        compatibility.guess_clip(SimpleNamespace(**{**fields, "model_type": "siglip_vision_model"}))
    for field in compatibility.SIZES:
        with pytest.raises(ValueError, match=f"CLIP is missing, and LLaVA's vision tower .*{field} 7.*--visual-only"):
            compatibility.guess_clip(SimpleNamespace(**{**fields, field: 7}))


def test_the_published_llavas_get_the_clip_that_they_were_made_with():
    for entry in FULL_SIZE.values():
        assert compatibility.guess_clip(entry.config().vision_config) == entry.clip


def test_a_guessed_clip_is_taken(run, sources, tmp_path, monkeypatch):
    llava, clip = sources
    monkeypatch.setitem(compatibility.KNOWN_CLIPS, (32, tiny.PATCH_SIZE, tiny.IMAGE_SIZE, 4), str(clip))
    code, out, _ = run(llava, tmp_path / "out", "--dry-run")
    assert code == 0 and "guessed from the vision tower" in " ".join(out.split())
    assert run(llava, tmp_path / "out")[0] == 0
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").token_recovery is not None
    assert reccomp_hf.convert(llava, "auto", tmp_path / "other").is_dir()


# ---- the CLIP's tower is compared ----------------------------------------------------------------------------------


def test_force_takes_an_unrelated_clip_and_says_so(sources, tmp_path, run, caplog):
    other = tmp_path / "clip"
    tiny.clip_model(seed=5).save_pretrained(other)
    tiny.clip_tokenizer().save_pretrained(other)
    code, _, err = run(sources[0], other, tmp_path / "out")
    assert code == 2 and "does not come from this CLIP" in err and "--force" in err
    assert not (tmp_path / "out").exists()
    assert run(sources[0], other, tmp_path / "out", "--force")[0] == 0
    assert "they are unrelated" in caplog.text and "which patches belong to the question" in caplog.text
    assert (tmp_path / "out").is_dir()


def test_the_cosine_in_the_warning_is_the_weights_own(sources, tmp_path, caplog):
    clip = tiny.clip_model(seed=1, vision_from=LLAVA.stock())
    weights = dict(clip.vision_model.named_parameters())
    name = next(name for name in weights if name.endswith("encoder.layers.0.mlp.fc1.weight"))
    with torch.no_grad():
        weights[name].neg_()
    cosine = 1 - 2 / sum(weight.ndim > 1 for weight in weights.values())
    reccomp_hf.convert(sources[0], clip, tmp_path / "out", clip_tokenizer=tiny.clip_tokenizer())
    assert f"mean cosine of their weights {cosine:.4f}): it was fine-tuned" in caplog.text


# ---- a dry run -----------------------------------------------------------------------------------------------------


@each_architecture
def test_a_dry_run_shows_the_plan_and_writes_nothing(run, architecture, tmp_path):
    sources = architecture.save_sources(tmp_path / "sources")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*sources, tmp_path / "a" / "out", "--set", "budget=0.25", "--dry-run", "--dtype", "float16")
    assert (code, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing is written" in out and "budget 0.25" in out and architecture.config_class.model_type in out
    assert "llama, 2 layers of width 32" in out and "keys and shapes of the weights" in out
    headers = [shards.read_headers(source) for source in sources]
    size = sum(header.nbytes() for header in headers[0].values())
    assert f"{sources[0]}, {size / 1e6:.1f} MB of F32 in 1 file;" in " ".join(out.split())


def test_a_dry_run_finds_what_headers_tell(run, sources, tmp_path):
    spoilt = shutil.copytree(sources[0], tmp_path / "spoilt")
    os.truncate(spoilt / "model.safetensors", 9000)
    code, out, err = run(spoilt, sources[1], tmp_path / "out", "--dry-run")
    assert (code, out) == (2, "") and "truncated" in err
    assert "is not an empty folder" in run(*sources, spoilt, "--dry-run")[2]


def test_a_dry_run_needs_no_weights(run, sources, tmp_path):
    bare = [shutil.copytree(s, tmp_path / s.name, ignore=shutil.ignore_patterns("*.safetensors")) for s in sources]
    code, out, _ = run(*bare, tmp_path / "out", "--dry-run")
    assert code == 0 and "they are read when converting" in " ".join(out.split())


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private says how to push, but nothing is pushed: add --push REPO"),
        (["--revision", "next"], "--revision says how to push, but nothing is pushed"),
        (["--push", "me/not a name"], "Repo id must"),
        (["--set", "text_encoder_config=null"], "text_encoder_config follows from clip"),
    ],
)
def test_options_that_do_not_fit(run, sources, tmp_path, options, message):
    code, out, err = run(*sources, tmp_path / "out", *options)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype(sources, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of 'float32', 'float16', 'bfloat16' or None, got 'int8'"):
        reccomp_hf.convert(*sources, tmp_path / "out", dtype="int8")


def test_push_follows_when_the_folder_is_there(run, sources, tmp_path, monkeypatch):
    pushed = []

    def push(folder, repo, **settings):
        assert "me/model" in (folder / "README.md").read_text(encoding="utf-8")
        pushed.append((folder, repo, settings))
        return SimpleNamespace(url="the address", repo="me/model", branch="next")

    monkeypatch.setattr("reccomp_hf.checkpoints.hub.push", push)
    arguments = [*sources, tmp_path / "out", "--push", "me/model"]
    code, out, _ = run(*arguments, "--private", "--revision", "next", "--dtype", "bfloat16")
    assert code == 0 and "Pushed to the address" in out and "from_pretrained('me/model', revision='next')" in out
    assert "byte for byte" not in out
    assert pushed == [(tmp_path / "out", "me/model", {"private": True, "revision": "next"})]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config["dtype"], config["text_config"].get("dtype", "bfloat16")} == {"bfloat16"}


def test_the_command_says_what_was_proven(run, sources, tmp_path):
    code, out, _ = run(*sources, tmp_path / "out", "--set", "budget=10")
    assert code == 0
    assert (
        "1 weight file of LLaVA byte for byte; vision tower, projector, text similarity equal to the sources'; "
        "10 of 100 visual tokens chosen on a probe image." in " ".join(out.split())
    )


def test_a_quantised_llava_is_refused(sources, tmp_path):
    spoilt = shutil.copytree(sources[0], tmp_path / "spoilt")
    fields = json.loads((spoilt / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (spoilt / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is quantised: convert the plain model"):
        reccomp_hf.convert(spoilt, sources[1], tmp_path / "out")


def test_a_model_without_its_head_is_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="llava must be a LlavaForConditionalGeneration, got LlavaModel"):
        reccomp_hf.convert(tiny.stock_llava().model, sources[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
