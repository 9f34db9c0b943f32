"""A processor that does not fit its model is mended with a warning, or refused, before any weight is read."""

import copy
import json

import pytest
import tiny
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from conversions import copies, leave_cards_unmeasured, sharded
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
)

import reccomp_hf
from reccomp_hf.checkpoints.conversion.plan import plan_conversion
from reccomp_hf.checkpoints.convert import plan_processor
from reccomp_hf.cli import main as cli
from reccomp_hf.core.configuration import TokenRecoveryConfig

SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@pytest.fixture(autouse=True)
def unmeasured_cards(monkeypatch):
    leave_cards_unmeasured(monkeypatch)


def edit(path, **fields):
    values = json.loads(path.read_text())
    for name, value in fields.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
    path.write_text(json.dumps(values))


def test_a_processor_of_an_old_file_gets_its_settings_from_the_config(tmp_path, caplog):
    llava, _ = copies(tmp_path / "sources")
    edit(llava / "processor_config.json", **dict.fromkeys(SETTINGS))
    assert cli.main(["convert", str(llava), str(tmp_path / "dry"), "--visual-only", "--dry-run"]) == 0
    for name in SETTINGS:
        assert f"The processor's {name} is" in caplog.text and "does not fit the config" in caplog.text
    folder = reccomp_hf.convert(llava, None, tmp_path / "out", "balanced", budget=16)
    processor = AutoProcessor.from_pretrained(folder)
    assert {name: getattr(processor, name) for name in SETTINGS} == tiny.PROCESSOR_SETTINGS
    inputs = processor(images=tiny.pictures(1), text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    assert int((inputs["input_ids"] == 4).sum()) == tiny.PATCHES
    AutoModelForImageTextToText.from_pretrained(folder).generate(**inputs, max_new_tokens=2)


@each_architecture
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_additional_image_tokens", 0),
        ("num_additional_image_tokens", 2),
        ("patch_size", 5),
        ("vision_feature_select_strategy", "full"),
    ],
)
def test_a_setting_that_differs_is_the_configs(architecture, name, value, caplog):
    plan, stock = plan_of(architecture), architecture.stock_processor()
    setattr(stock, name, value)
    processor = plan_processor(plan, stock)
    assert getattr(processor, name) == tiny.PROCESSOR_SETTINGS[name]
    assert f"The processor's {name} is {value!r}, which does not fit the config" in caplog.text


@each_architecture
def test_a_processor_that_fits_gives_no_warning(architecture, caplog):
    plan_processor(plan_of(architecture))
    assert caplog.text == ""


def test_another_image_size_is_refused():
    stock = tiny.stock_processor()
    stock.image_processor = tiny.image_processor(tiny.IMAGE_SIZE + tiny.PATCH_SIZE)
    with pytest.raises(ValueError, match="makes images of 44 x 44 pixels, but the vision tower reads 40 x 40"):
        plan_processor(plan_of(LLAVA), stock)


def test_other_pinpoints_are_refused():
    stock = tiny.stock_next_processor()
    stock.image_processor.image_grid_pinpoints = [[40, 40], [80, 40]]
    with pytest.raises(ValueError, match=r"image_grid_pinpoints .* differ from the config's"):
        plan_processor(plan_of(LLAVA_NEXT), stock)


def plan_of(architecture):
    return plan_conversion(*sharded(architecture), TokenRecoveryConfig.from_preset("balanced"))


DECODERS = {"mixtral": (MixtralConfig, {"num_local_experts": 2}), "mistral": (MistralConfig, {"head_dim": 8})}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_with_merged_or_renamed_weights_is_complete(decoder, tmp_path):
    config_class, fields = DECODERS[decoder]
    text = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **tiny._text_ids(),
        **fields,
    )
    torch.manual_seed(0)
    stock = LlavaForConditionalGeneration(tiny.llava_config(text_config=text)).eval()
    stock.save_pretrained(tmp_path / "stock")
    tiny.stock_processor().save_pretrained(tmp_path / "stock")
    folder = reccomp_hf.convert(tmp_path / "stock", None, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(folder, token_recovery={"enabled": False}).eval()
    inputs = tiny.stock_processor()(images=tiny.pictures(1), text="<image> What is it?", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits)
        ours = AutoModelForImageTextToText.from_pretrained(folder)
        assert ours(**copy.copy(inputs)).logits.shape[1] < inputs["input_ids"].shape[1]


def test_a_decoder_without_an_expert_is_incomplete(tmp_path):
    text = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        tie_word_embeddings=False,
        **tiny._text_ids(),
    )
    LlavaForConditionalGeneration(tiny.llava_config(text_config=text)).save_pretrained(tmp_path / "stock")
    tiny.stock_processor().save_pretrained(tmp_path / "stock")
    edit(tmp_path / "stock" / "config.json", text_config={**text.to_dict(), "num_local_experts": 3})
    with pytest.raises(ValueError, match="is not a complete LlavaForConditionalGeneration"):
        reccomp_hf.convert(tmp_path / "stock", None, tmp_path / "out")
