"""Converting copies LLaVA's files as they are, whichever release wrote them, or casts them."""

import json
import shutil

import pytest
import tiny
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from conversions import (
    INDEX,
    SMALL,
    assert_nothing_new,
    converted,
    copies,
    each_of,
    leave_cards_unmeasured,
    rewrite,
    sharded,
    weights_of,
)
from paths import DATA
from safetensors.torch import load_file, save_file
from saved import assert_bit_equal, fixture_values, load
from transformers import AutoModelForImageTextToText, CLIPModel, LlamaConfig, MistralConfig, Qwen2Config

import reccomp_hf
from reccomp_hf.checkpoints.conversion import shards
from reccomp_hf.checkpoints.quiet import quiet


@pytest.fixture(autouse=True)
def unmeasured_cards(monkeypatch):
    leave_cards_unmeasured(monkeypatch)


@pytest.fixture
def sources(tmp_path):
    return copies(tmp_path / "sources")


# ---- what is written -----------------------------------------------------------------------------------------------


@each_architecture
def test_llavas_files_are_copied_byte_for_byte(architecture):
    stock, folder = sharded(architecture)[0], converted(architecture)
    before, after = (sorted(one.glob("*.safetensors")) for one in (stock, folder))
    assert len(before) > 5 and len(after) == len(before) + 1
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after[:-1]]
    index = json.loads((folder / INDEX).read_text())
    held = {path.name: set(load_file(path)) for path in after}
    assert {key: name for name, keys in held.items() for key in keys} == index["weight_map"]
    weights = weights_of(folder)
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in weights.values())
    assert all(key.startswith("token_recovery.") for key in load_file(after[-1]))
    assert_bit_equal(load(AutoModelForImageTextToText, folder), load(architecture.stock_class, stock))


@each_of("architecture, whole", (LLAVA, False), (LLAVA_NEXT, True))
def test_a_visual_only_model_has_llavas_files_alone(architecture, whole, tmp_path):
    stock, _ = sharded(architecture)
    if whole:
        other = shutil.copytree(stock, tmp_path / "whole", ignore=shutil.ignore_patterns("model*"))
        save_file(weights_of(stock), other / "model.safetensors", metadata={"format": "pt"})
        stock = other
    folder = reccomp_hf.convert(stock, None, tmp_path / "out", budget=7)
    files = {path.name: path.read_bytes() for path in stock.glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == files
    if whole:
        assert not (folder / INDEX).exists()
    else:
        assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == weights_of(stock).keys()


@each_of("architecture, dtype", (LLAVA, "bfloat16"), (LLAVA_NEXT, "float16"))
def test_weights_are_cast_on_request(architecture, dtype, tmp_path):
    stock, clip = sharded(architecture)
    folder = reccomp_hf.convert(stock, clip, tmp_path / "out", dtype=dtype)
    wanted, weights = weights_of(stock), weights_of(folder)
    assert {str(value.dtype) for value in weights.values()} == {f"torch.{dtype}"}
    assert all(torch.equal(weights[key], value.to(getattr(torch, dtype))) for key, value in wanted.items())
    assert len(list(folder.glob("*.safetensors"))) == len(list(stock.glob("*.safetensors"))) + 1
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert model.dtype == model.token_recovery.visual_projection.weight.dtype == getattr(torch, dtype)


def test_a_cast_to_what_the_weights_are_changes_no_byte(tmp_path):
    stock, clip = sharded(LLAVA)
    folder = reccomp_hf.convert(stock, clip, tmp_path / "out", dtype="float32")
    pairs = zip(sorted(stock.glob("*.safetensors")), sorted(folder.glob("*.safetensors")), strict=False)
    assert all(one.read_bytes() == other.read_bytes() for one, other in pairs)


def test_config_and_card_name_no_folder_of_this_machine():
    folder = converted(LLAVA)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".md"):
            assert str(folder.parents[1]) not in path.read_text(encoding="utf-8"), path.name
    assert json.loads((folder / "config.json").read_text())["architectures"] == [LLAVA.model_class.__name__]
    assert (folder / "generation_config.json").read_bytes() == (
        sharded(LLAVA)[0] / "generation_config.json"
    ).read_bytes()


# ---- what is read --------------------------------------------------------------------------------------------------


def stock_sources_of_fixture(line, architecture, folder):
    """The stock LLaVA and the CLIP that a checkpoint of ours, written by either line, was made of."""
    fixture, stock, clip = DATA / f"checkpoint_{line}" / architecture.name, folder / "stock", folder / "clip"
    weights = load_file(fixture / "model.safetensors")
    architecture.stock_processor().save_pretrained(stock)
    fields = json.loads((fixture / "config.json").read_text())
    fields["model_type"] = fields["model_type"].removesuffix("_reccomp")
    fields.pop("token_recovery"), fields.pop("auto_map", None)
    (stock / "config.json").write_text(json.dumps(fields))
    ours = "token_recovery."
    stock_weights = {key: value for key, value in weights.items() if not key.startswith(ours)}
    save_file(stock_weights, stock / "model.safetensors", metadata={"format": "pt"})
    tiny.clip_model().config.save_pretrained(clip)
    tiny.clip_tokenizer().save_pretrained(clip)
    clip_weights = {"logit_scale": torch.ones(())}
    for key, value in weights.items():
        if key.startswith("vision_tower."):
            clip_weights[f"vision_model.{key.removeprefix('vision_tower.').removeprefix('vision_model.')}"] = value
        elif key.startswith(ours):
            clip_weights[key.removeprefix(ours).removeprefix("text_encoder.")] = value
    save_file({key: value.clone() for key, value in clip_weights.items()}, clip / "model.safetensors")
    rewrite(clip / "model.safetensors", lambda tensors: None)  # with the metadata that transformers asks for
    return stock, clip


@each_architecture
@pytest.mark.parametrize("line", ["4x", "5x"])
def test_what_either_line_wrote_converts_to_the_same_answers(architecture, line, tmp_path):
    stock, clip = stock_sources_of_fixture(line, architecture, tmp_path)
    folder = reccomp_hf.convert(stock, clip, tmp_path / "out")
    values = fixture_values(folder)
    expected = load_file(DATA / f"checkpoint_{line}" / architecture.name / "expected.safetensors")
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def as_in_memory(key):
    """The key that transformers has used for the modules since 4.52."""
    place = shards.place_of(key)
    return place if place.startswith("lm_head.") else f"model.{place}"


def as_published(key):
    """The key in llava-hf's repositories."""
    place = shards.place_of(key)
    if place.startswith("vision_tower."):
        return place.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if place.startswith("language_model."):
        return place.replace("language_model.", "language_model.model.", 1)
    return f"language_model.{place}" if place.startswith("lm_head.") else place


@each_of("architecture, layout", (LLAVA, as_in_memory), (LLAVA_NEXT, as_in_memory), (LLAVA, as_published))
def test_every_layout_of_keys_is_read(architecture, layout, tmp_path):
    stock, clip = sharded(architecture)
    weights = {layout(key): value for key, value in weights_of(stock).items()}
    other = shutil.copytree(stock, tmp_path / "other", ignore=shutil.ignore_patterns("model*"))
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(101)  # as old releases wrote
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    folder = reccomp_hf.convert(other, clip, tmp_path / "out")
    assert_bit_equal(load_without_remarks(folder), load(architecture.stock_class, stock))


def load_without_remarks(folder):
    with quiet():
        return AutoModelForImageTextToText.from_pretrained(folder)


TEXT_MODELS = {
    "llama3": lambda: LlamaConfig(**SMALL, rope_theta=5e5, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen2-tied": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
}


@each_of(
    "architecture, text", (LLAVA, "llama3"), (LLAVA_NEXT, "mistral"), (LLAVA_NEXT, "qwen2"), (LLAVA, "qwen2-tied")
)
def test_other_text_models(architecture, text, tmp_path):
    config, clip = architecture.stock().config.to_dict(), sharded(architecture)[1]
    for name in ("model_type", "architectures", "transformers_version", "text_config"):
        config.pop(name, None)
    text = TEXT_MODELS[text]()
    config["tie_word_embeddings"] = text.tie_word_embeddings
    stock = architecture.stock_class(architecture.stock_class.config_class(text_config=text, **config)).eval()
    stock.model.vision_tower.load_state_dict(architecture.stock().model.vision_tower.state_dict())
    stock.save_pretrained(tmp_path / "stock", max_shard_size="60KB")
    architecture.stock_processor().save_pretrained(tmp_path / "stock")
    folder = reccomp_hf.convert(tmp_path / "stock", clip, tmp_path / "out", budget=9)
    ours = load(AutoModelForImageTextToText, folder)
    assert type(ours.model.language_model) is type(stock.model.language_model)
    assert_bit_equal(ours, stock)
    assert ours(**architecture.encode()).visual_token_counts.tolist() == [9, 9, 9, 9]


def as_pickle(folder):
    """Replace a folder's safetensors by PyTorch's own file."""
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    for path in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
        path.unlink()


@pytest.mark.parametrize("which", [0, 1], ids=["llava", "clip"])
def test_weights_that_are_no_safetensors(which, sources, tmp_path):
    as_pickle(sources[which])
    folder = reccomp_hf.convert(*sources, tmp_path / "out")
    wanted, weights = weights_of(converted(LLAVA)), weights_of(folder)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], value) for key, value in wanted.items())
    assert_nothing_new(tmp_path, "sources", "out")


def test_a_pickle_that_lacks_weights_is_refused(sources, tmp_path):
    as_pickle(sources[1])
    weights = torch.load(sources[1] / "pytorch_model.bin")
    weights.pop("text_projection.weight")
    torch.save(weights, sources[1] / "pytorch_model.bin")
    with (
        quiet(),
        pytest.raises(ValueError, match=r"not a complete CLIPModel: .*text_projection\.weight"),
    ):
        reccomp_hf.convert(*sources, tmp_path / "out")
    assert_nothing_new(tmp_path, "sources")


def test_a_clip_in_many_files_and_a_llava_of_another_dtype(tmp_path, caplog):
    """Of half a CLIP's precision LLaVA's tower is equal to it, and that is silent."""
    stock, clip = sharded(LLAVA)
    load(CLIPModel, clip).save_pretrained(tmp_path / "clip", max_shard_size="20KB")
    tiny.clip_tokenizer().save_pretrained(tmp_path / "clip")
    load(LLAVA.stock_class, stock).half().save_pretrained(tmp_path / "stock")
    tiny.stock_processor().save_pretrained(tmp_path / "stock")
    folder = reccomp_hf.convert(tmp_path / "stock", tmp_path / "clip", tmp_path / "out")
    assert not [record for record in caplog.records if record.name.startswith("reccomp_hf")]
    own, text = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    assert {value.dtype for value in own.values()} == {torch.float16}
    assert {value.dtype for value in text.values()} == {torch.float32}
    assert load(AutoModelForImageTextToText, folder).token_recovery is not None
