"""Quantised checkpoints: CLIP's text side stays as it is, and choice and answers stay what full precision gives."""

import copy
import json

import numpy as np
import pytest
import torch
from architectures import LLAVA, each_architecture, generate, labels_of
from demo_model import demo_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from reccomp_hf.core.compat import IS_V5
from reccomp_hf.demo import checkpoint_folder
from reccomp_hf.experiments import precision
from reccomp_hf.experiments.precision import compare, kept_patches, load_in, overlap, quantization_config, weight_bytes
from reccomp_hf.measure.evaluation.samples import demo_samples
from reccomp_hf.measure.evaluation.settings import parse_settings

pytest.importorskip("torchao", reason="the test extra brings it; without it nothing is quantised here")
pytest.importorskip("bitsandbytes", reason="the test extra brings it; without it nothing is quantised here")

QUANTIZED = ("int8", "int4", "bnb-int8", "bnb-nf4")
each_precision = pytest.mark.parametrize("name", QUANTIZED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    written = {}

    def folder_of(architecture):
        if architecture.name not in written:
            folder = tmp_path_factory.mktemp(architecture.name)
            written[architecture.name] = architecture.save_converted(folder, budget=24)
        return written[architecture.name]

    return folder_of


def is_quantized(weight):
    return type(weight) not in (torch.nn.Parameter, torch.Tensor)


def linear_weights(module):
    return [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("name", QUANTIZED[:3])  # bitsandbytes' NF4 wants widths that 64 divides on a CPU
def test_everything_but_our_modules_is_quantized(architecture, name, folders):
    plain = AutoModelForImageTextToText.from_pretrained(folders(architecture), dtype=torch.bfloat16)
    model = load_in(folders(architecture), name)
    for part in ("text_encoder", "visual_projection"):  # `modules()` of the parent would stop there
        ours, theirs = (getattr(one.token_recovery, part).state_dict() for one in (model, plain))
        assert not any(is_quantized(weight) for weight in linear_weights(getattr(model.token_recovery, part)))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not is_quantized(model.lm_head.weight)
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model):
        assert all(is_quantized(weight) for weight in linear_weights(part))
    assert weight_bytes(model) < weight_bytes(plain)
    batch = architecture.encode().copy()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    output = model(**batch)
    assert torch.isfinite(output.logits).all()
    assert {*output.visual_token_counts.tolist()} == {24}
    assert generate(model, batch).shape[0] == len(batch["input_ids"])


def test_the_bytes_of_plain_weights_are_counted_right():
    model, _ = demo_model()
    expected = sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])
    assert weight_bytes(model) == expected


@pytest.mark.parametrize("given", ["object", "dict"])
def test_what_the_caller_skips_stays_skipped(given, folders):
    skipped = ["model.multi_modal_projector", "lm_head"]
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    before = copy.deepcopy(config.to_dict())
    model = AutoModelForImageTextToText.from_pretrained(
        folders(LLAVA), quantization_config=config if given == "object" else config.to_dict()
    )
    assert config.to_dict() == before
    assert not any(is_quantized(weight) for weight in linear_weights(model.model.multi_modal_projector))
    assert all(is_quantized(weight) for weight in linear_weights(model.model.language_model))
    assert not any(is_quantized(weight) for weight in linear_weights(model.token_recovery.text_encoder))


@each_precision
def test_choice_and_answers_agree_with_full_precision(name):
    model, processor = demo_model()
    samples, settings = demo_samples(36), parse_settings(precision.DEFAULT_SETTINGS)
    quantized = load_in(checkpoint_folder("demo"), name)
    for setting in settings:
        full, ours = (kept_patches(one, processor, samples, setting) for one in (model, quantized))
        shares = overlap(ours, full)
        assert shares.shape == (36,)
        assert shares.mean() > 0.85, (name, setting.name, shares.mean())
        assert (ours.sum(-1) == full.sum(-1)).all()
    inputs = processor(
        images=samples[0].open(), text=f"USER: <image>\n{samples[0].question} ASSISTANT:", return_tensors="pt"
    )
    answers = [
        processor.decode(one.generate(**inputs.to(dtype=one.dtype), max_new_tokens=4)[0, -4:])
        for one in (model, quantized)
    ]
    assert answers[0] == answers[1]


def test_overlap_is_a_share_of_the_second():
    ours = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    theirs = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1]]).bool()
    assert overlap(ours, theirs).tolist() == [1.0, 0.5]


def test_the_report_compares_with_full_precision():
    _, processor = demo_model()
    samples, settings = demo_samples(12), parse_settings("paper:0.1")
    report = compare(checkpoint_folder("demo"), processor, samples, settings, ["int8"])
    assert [*report.answers.results] == ["float32, off", "float32, paper:0.1", "int8, off", "int8, paper:0.1"]
    assert report.answers.reference == "float32, off"
    assert (report.overlaps["float32, paper:0.1"] == 1).all()
    assert report.megabytes["float32"] == pytest.approx(9.535, abs=0.01)
    assert 2 < report.megabytes["int8"] < 3.5
    assert report.setting_agreement("float32, paper:0.1") == report.setting_agreement("float32, off") == 1
    answers = [report.answers.results[f"{name}, paper:0.1"].answers for name in ("float32", "int8")]
    assert report.setting_agreement("int8, paper:0.1") == np.mean(
        [one == other for one, other in zip(*answers, strict=True)]
    )
    lines = report.markdown().splitlines()
    assert len(lines) == 6
    assert lines[2].split("|")[1].strip() == "float32"
    assert report.to_dict()["overlaps"]["int8, paper:0.1"]["min"] <= 1
    with pytest.raises(ValueError, match="Unknown precision 'int3'; write one of float32"):
        compare(checkpoint_folder("demo"), processor, samples, settings, ["int3"])
    assert quantization_config("bfloat16") is None


@torch.no_grad()
@each_precision
def test_a_quantized_checkpoint_loads_again(name, tmp_path):
    if name in ("int8", "int4") and not IS_V5:
        pytest.skip("transformers 4.57 does not write TorchAO's weights as safetensors")
    model, (_, processor) = load_in(checkpoint_folder("demo"), name), demo_model()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert not any(is_quantized(weight) for weight in linear_weights(again.token_recovery.text_encoder))
    assert all(is_quantized(weight) for weight in linear_weights(again.model.language_model))
    prompt = "USER: <image>\nHow many objects are there? ASSISTANT:"
    inputs = processor(images=demo_samples(1)[0].open(), text=prompt, return_tensors="pt").to(dtype=torch.bfloat16)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.skipif(not IS_V5, reason="transformers 4.57 does not write TorchAO's weights as safetensors")
def test_the_metadata_of_quantized_weights_names_the_keys_of_the_file(tmp_path):
    """Other readers, vLLM for one, put a weight together by the metadata."""
    model = load_in(checkpoint_folder("demo"), "int8")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    described = set()
    for name, text in metadata.items():
        if text.startswith("{"):
            path, _, leaf = name.rpartition(".")
            parts = json.loads(text).get("_tensor_data_names", [])
            described |= {f"{path}._{leaf}_{part}" for part in parts} if parts else {name}
    assert keys <= described and any("_weight_qdata" in key for key in keys)


# PEFT 0.21 asks for an attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@each_architecture
def test_adapters_are_trained_on_4_bit_weights(architecture, folders):
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(
            folders(architecture), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        ),
        LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*vision_tower.*"),
    )
    batch = architecture.encode()
    model.train()(**batch, labels=labels_of(model, batch)).loss.backward()
    reached = {name for name, value in model.named_parameters() if "lora_B" in name and value.grad.any()}
    assert any("multi_modal_projector" in name for name in reached)
    assert any("language_model" in name for name in reached)
    assert not any("token_recovery" in name or "vision_tower" in name for name in reached)
