"""Promises of every compressed model about where and how it runs: attention, precision, devices, training, PEFT."""

import accelerate
import pytest
import torch
from architectures import (
    MODEL_SETTINGS,
    assert_same_records,
    call,
    each_architecture,
    generate,
    labels_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logged_warnings
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from reccomp_hf.core.compat import IS_V5

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LORA_TARGETS = {
    "all-linear": "all-linear",
    "names": ["q_proj", "v_proj"],
    "pattern": r".*\.(q_proj|v_proj|fc1|visual_projection)",
}
# Start of a message -> why it is none of our business.
LOGGED = {
    "Using a slow image processor": "4.57, for every image processor that works without torchvision",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted checkpoint of every architecture, written when first asked for."""
    written = {}

    def folder_of(architecture):
        if architecture.name not in written:
            written[architecture.name] = architecture.save_converted(tmp_path_factory.mktemp(architecture.name))
        return written[architecture.name]

    return folder_of


@torch.no_grad()
@each_architecture
def test_eager_equals_sdpa(architecture, folders):
    eager, sdpa = (
        architecture.model_class.from_pretrained(folders(architecture), attn_implementation=name)
        for name in ("eager", "sdpa")
    )
    assert eager.config.get_text_config()._attn_implementation == "eager"
    batch = architecture.encode()
    for setting in MODEL_SETTINGS.values():
        (short, record), (short_too, record_too) = (
            model.compress_inputs(**batch, token_recovery=setting) for model in (eager, sdpa)
        )
        assert_same_records([record], [record_too])
        inside = short["attention_mask"].bool()
        torch.testing.assert_close(eager(**short).logits[inside], sdpa(**short_too).logits[inside], **CLOSE)


@torch.no_grad()
@each_architecture
def test_the_default_dtype_changes_nothing(architecture):
    """It is a state of all threads, and `from_pretrained` sets it while it builds a model in another one."""
    model, batch = architecture.compressed(), architecture.encode()
    other = torch.bfloat16 if IS_V5 else torch.float64  # in bfloat16 the mask of 4.57's own text encoder overflows
    for setting in MODEL_SETTINGS.values():
        expected, record = model.compress_inputs(**batch, token_recovery=setting)
        torch.set_default_dtype(other)
        try:
            found, record_too = model.compress_inputs(**batch, token_recovery=setting)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same_records([record], [record_too])
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), (setting, name)


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize(
    "setting", [MODEL_SETTINGS["paper"], MODEL_SETTINGS["spread"], MODEL_SETTINGS["method authors"]], ids=str
)
def test_bfloat16_is_finite(architecture, setting, folders):
    model = architecture.model_class.from_pretrained(folders(architecture), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch = architecture.encode()
    output = model(**batch, labels=labels_of(model, batch), token_recovery=setting)
    assert output.image_hidden_states.dtype == torch.bfloat16
    assert torch.isfinite(output.loss)
    assert torch.isfinite(output.logits).all()
    assert generate(model, batch, token_recovery=setting).shape[0] == len(batch["input_ids"])


@each_architecture
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients(architecture, folders, checkpointing):
    model, batch = architecture.model_class.from_pretrained(folders(architecture)), architecture.encode()
    tower, projector, recovery = model.model.vision_tower, model.model.multi_modal_projector, model.token_recovery
    frozen = [*tower.parameters(), *recovery.text_encoder.parameters(), *recovery.visual_projection.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    model.train()
    if checkpointing:
        new_name = getattr(model, "activation_checkpointing_enable", None)  # 5.x deprecates the other
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
    loss = model(**batch, labels=labels_of(model, batch)).loss
    loss.backward()
    assert all(parameter.grad is None for parameter in frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in projector.parameters())
    assert len(trained) > len(list(projector.parameters()))
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained if parameter.grad is not None)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch, labels=labels_of(model, batch)).loss, loss.detach(), **CLOSE)


@each_architecture
def test_a_vision_tower_is_trained_on_request(architecture):
    model, batch = architecture.build(), architecture.encode()
    model.model.vision_tower.requires_grad_(True)
    model(**batch, labels=labels_of(model, batch)).loss.backward()
    reached = [name for name, value in model.model.vision_tower.named_parameters() if value.grad is not None]
    assert any("patch_embedding" in name for name in reached)
    assert all(value.grad is None for name, value in model.named_parameters() if name.startswith("token_recovery"))


# Said of every model whose first weights wait on the disk, and of LLaVA-NeXT's newline, a weight of its own.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate\\(\\) with the `input_ids` being on a device:UserWarning"
)
@torch.no_grad()
@each_architecture
def test_placed_models_give_the_same_output(architecture, folders, tmp_path):
    load, folder, batch = architecture.model_class.from_pretrained, folders(architecture), architecture.encode()
    expected, ids = load(folder)(**batch).logits, generate(load(folder), batch)
    placed = {
        "map": load(folder, device_map={"": "cpu"}),
        "auto": load(folder, device_map="auto", max_memory={"cpu": "1GB"}),
        "disk": load(folder, device_map="auto", max_memory={"cpu": "300KB"}, offload_folder=tmp_path),
        "offload": accelerate.cpu_offload(load(folder), execution_device=torch.device("cpu")),
    }
    assert "disk" in placed["disk"].hf_device_map.values()
    for name, model in placed.items():
        assert torch.equal(model(**batch).logits, expected), name
        assert torch.equal(generate(model, batch), ids), name


# PEFT 0.21 asks for an attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@each_architecture
@pytest.mark.parametrize("targets", LORA_TARGETS.values(), ids=LORA_TARGETS)
def test_adapters_leave_the_recovery_modules_alone(architecture, targets, folders, tmp_path):
    load, folder, batch = architecture.model_class.from_pretrained, folders(architecture), architecture.encode()
    expected, ids = load(folder)(**batch).logits, generate(load(folder), batch)
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    adapted = [name for name in model.state_dict() if "lora_" in name]
    assert any("language_model" in name for name in adapted)
    assert not any("token_recovery" in name for name in adapted)
    assert not any("token_recovery" in name for name in model.peft_config["default"].target_modules)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, expected)
        assert torch.equal(generate(model, batch), ids)
    model.train()(**batch, labels=labels_of(model, batch)).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "language_model" in name:
                assert parameter.grad.abs().sum() > 0, name
                parameter.sub_(0.02 * parameter.grad.sign())
        changed = model.eval()(**batch).logits
    assert not torch.allclose(changed, expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, changed)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, changed, **CLOSE)
    assert merged.state_dict().keys() == load(folder).state_dict().keys()


@each_architecture
def test_nothing_is_logged(architecture, folders):
    with logged_warnings() as logged:
        model = AutoModelForImageTextToText.from_pretrained(folders(architecture))
        processor = AutoProcessor.from_pretrained(folders(architecture))
        batch = processor(**call(), return_tensors="pt", padding=True)
        model(**batch)
        for setting in MODEL_SETTINGS.values():
            generate(model, batch, token_recovery=setting)
        width = batch["input_ids"].shape[1]
        config = GenerationConfig(max_length=width + 4, bos_token_id=1, eos_token_id=2, pad_token_id=3)
        model.generate(**batch, generation_config=config)
        generate(model, batch, num_beams=2)
    assert [line for line in logged if not line.startswith(tuple(LOGGED))] == []
