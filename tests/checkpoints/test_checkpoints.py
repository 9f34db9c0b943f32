"""From stock files to ours and back: every weight is accounted for, on both transformers lines."""

import json

import pytest
import tiny
import torch
import transformers
from architectures import call, each_architecture, generate
from paths import DATA
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import assert_bit_equal, fixture_values, load
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import reccomp_hf

HEADS = {
    "image-text-to-text": AutoModelForImageTextToText,
    "vision2seq": reccomp_hf.AutoModelForVision2Seq,
}
if hasattr(transformers, "AutoModelForMultimodalLM"):  # 5.x
    HEADS["multimodal"] = transformers.AutoModelForMultimodalLM
SECTION = {
    "budget": 12,
    "text_share": 0.25,
    "merged_tokens": 3,
    "coverage_share": 0.125,
    "outlier_neighbors": 15,
    "merge_neighbors": 7,
    "outlier_threshold": 1.25,
    "text_relevance": "value",
    "text_relevance_sign": -1,
    "visual_layer": -2,
    "visual_heads": "mean",
    "position_ids": "original",
}


def keys_in(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {key for file in files for key in safe_open(file, framework="pt").keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stock, CLIP and converted folder of every architecture."""
    written = {}

    def folders_of(architecture):
        if architecture.name not in written:
            folder = tmp_path_factory.mktemp(architecture.name)
            written[architecture.name] = (folder / "stock", folder / "clip", architecture.save_converted(folder))
        return written[architecture.name]

    return folders_of


# What reccomp_hf.AutoModelForVision2Seq is there for: the name that 4.57 deprecates and 5.x does not have.
@pytest.mark.filterwarnings("ignore:The class `AutoModelForVision2Seq` is deprecated:FutureWarning")
@each_architecture
@pytest.mark.parametrize("name", HEADS)
def test_stock_weights_arrive_bit_for_bit(architecture, name, folders):
    stock_folder, clip_folder, folder = folders(architecture)
    ours = load(HEADS[name], folder)
    assert type(ours) is architecture.model_class
    assert_bit_equal(ours, load(architecture.stock_class, stock_folder))
    clip, text = load(transformers.CLIPModel, clip_folder), ours.token_recovery.text_encoder
    assert torch.equal(ours.token_recovery.visual_projection.weight, clip.visual_projection.weight)
    assert torch.equal(text.text_projection.weight, clip.text_projection.weight)
    assert all(torch.equal(text.state_dict()[f"text_model.{n}"], v) for n, v in clip.text_model.state_dict().items())


@torch.no_grad()
@each_architecture
def test_the_model_without_head_loads_from_the_same_folder(architecture, folders):
    folder = folders(architecture)[2]
    base, ours = AutoModel.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    assert type(base) is architecture.base_class
    weights, wanted = base.state_dict(), ours.state_dict()
    for name, value in weights.items():
        assert torch.equal(value, wanted[name if name.startswith("token_recovery") else f"model.{name}"]), name
    batch = architecture.encode()
    states = ours(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(base(**batch).last_hidden_state, states, rtol=1e-5, atol=1e-5)


@each_architecture
def test_stock_keys_stay_as_they_are_on_disk(architecture, folders):
    stock_folder, _, folder = folders(architecture)
    added = keys_in(folder) - keys_in(stock_folder)
    assert keys_in(stock_folder) < keys_in(folder)
    assert {".".join(key.split(".")[:2]) for key in added} == {
        "token_recovery.text_encoder",
        "token_recovery.visual_projection",
    }
    starts = {".".join(key.split(".")[:2]) for key in keys_in(folder)} - {"token_recovery"}
    assert {"language_model.lm_head", "language_model.model", "multi_modal_projector.linear_1"} <= starts
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == architecture.config_class.model_type
    assert config["architectures"] == [architecture.model_class.__name__]


@each_architecture
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_round_trip(architecture, shard, tmp_path, folders):
    model = load(AutoModelForImageTextToText, folders(architecture)[2])
    model.config.token_recovery = SECTION
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100KB")
    again = load(AutoModelForImageTextToText, tmp_path)
    assert again.config.token_recovery == model.config.token_recovery
    assert SECTION.items() <= again.config.token_recovery.to_dict().items()
    ours, theirs = (one.config.to_dict() for one in (model, again))
    for names in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        ours.pop(names, None), theirs.pop(names, None)
    assert ours == theirs
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    batch = architecture.encode()
    assert torch.equal(generate(model, batch), generate(again, batch))
    assert AutoConfig.from_pretrained(tmp_path).token_recovery.budget == 12
    assert keys_in(tmp_path) == keys_in(folders(architecture)[2])


@each_architecture
def test_a_text_encoder_config_object_is_as_good_as_its_dict(architecture):
    config = transformers.CLIPTextConfig(**architecture.text_config())
    section = reccomp_hf.TokenRecoveryConfig(text_encoder_config=config)
    assert section == reccomp_hf.TokenRecoveryConfig(**section.to_dict())
    assert section.replace({"budget": 4}).text_encoder_config == section.text_encoder_config


@each_architecture
def test_a_missing_weight_is_an_error(architecture, tmp_path, folders):
    model = load(AutoModelForImageTextToText, folders(architecture)[2])
    model.save_pretrained(tmp_path)
    for missing in ("token_recovery.visual_projection.weight", "language_model.lm_head.weight"):
        weights = load_file(tmp_path / "model.safetensors")
        value = weights.pop(missing)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights of .*, which would be random: .*\.weight"):
            AutoModelForImageTextToText.from_pretrained(tmp_path)
        save_file({**weights, missing: value}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(AutoModelForImageTextToText, tmp_path)


@each_architecture
def test_a_stock_folder_is_no_checkpoint_of_ours(architecture, folders):
    stock_folder = folders(architecture)[0]
    config = AutoConfig.from_pretrained(folders(architecture)[2])
    with pytest.raises(ValueError, match=r"token_recovery.*reccomp_hf\.convert"):
        architecture.model_class.from_pretrained(stock_folder, config=config)


@each_architecture
def test_convert_keeps_what_is_in_the_output_folder(architecture, tmp_path, folders):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        reccomp_hf.convert(*folders(architecture)[:2], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    reccomp_hf.convert(*folders(architecture)[:2], tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@each_architecture
@pytest.mark.parametrize("part", ["config_class", "processor_class"])
def test_convert_leaves_nothing_behind_when_it_fails(architecture, part, tmp_path, folders, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(getattr(architecture, part), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        reccomp_hf.convert(*folders(architecture)[:2], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@each_architecture
def test_convert_refuses_a_clip_that_does_not_fit(architecture, tmp_path, folders):
    config = tiny.clip_config()
    config.vision_config.hidden_size = 48
    with pytest.raises(ValueError, match="hidden_size is 48 in the CLIP and 32 in LLaVA"):
        reccomp_hf.convert(folders(architecture)[0], transformers.CLIPModel(config), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@each_architecture
def test_a_visual_only_checkpoint_reads_no_question(architecture, tmp_path, folders):
    folder = reccomp_hf.convert(folders(architecture)[0], None, tmp_path / "new")
    model, processor = load(AutoModelForImageTextToText, folder), AutoProcessor.from_pretrained(folder)
    assert model.token_recovery is None
    assert keys_in(folder) == keys_in(folders(architecture)[0])
    batch = processor(**call(), return_tensors="pt", padding=True)
    assert not any(name.startswith("recovery") for name in batch)
    assert not any(record.text_mask.any() for record in model.recover(**batch))
    assert generate(model, batch).shape[0] == len(batch["input_ids"])
    assert model(**batch, token_recovery={"budget": 6}).visual_token_counts.unique().tolist() == [6]


@each_architecture
@pytest.mark.parametrize("line", ["4x", "5x"])
def test_a_checkpoint_of_either_line_loads(architecture, line):
    folder = DATA / f"checkpoint_{line}" / architecture.name
    values, expected = fixture_values(folder), load_file(folder / "expected.safetensors")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
