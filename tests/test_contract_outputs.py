"""What outputs, autocast and freezing promise, whatever was compressed."""

import pytest
import torch
from architectures import each_architecture
from peft import LoraConfig, get_peft_model


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("enabled", [True, False])
def test_outputs_always_have_the_counts(architecture, enabled):
    model, batch = architecture.compressed(), architecture.encode()
    output = model(**batch, token_recovery={"enabled": enabled})
    assert (output.visual_token_counts is not None) == enabled
    generated = model.generate(
        **batch, max_new_tokens=2, return_dict_in_generate=True, token_recovery={"enabled": enabled}
    )
    assert (generated.visual_token_counts is not None) == enabled
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model(**text).visual_token_counts is None


@torch.no_grad()
@each_architecture
def test_inputs_of_a_disabled_call_run_as_they_are(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    same, record = model.compress_inputs(**batch, token_recovery={"enabled": False})
    assert record is None
    assert torch.equal(model(**same).logits, model(**batch, token_recovery={"enabled": False}).logits)


@torch.no_grad()
@each_architecture
def test_scores_are_float32_under_autocast(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        records = model.recover(**batch)
    assert all(record.saliency.dtype == record.text_similarity.dtype == torch.float32 for record in records)


@each_architecture
def test_the_text_side_stays_frozen_when_everything_is_trained(architecture):
    model = architecture.build().requires_grad_(True)
    trained = {name.startswith("token_recovery.") for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {False}
    assert all(value.requires_grad for name, value in model.named_parameters() if "vision_tower" in name)


@each_architecture
def test_recover_reads_the_feature_layer_that_a_call_names(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    usual, other = (model.recover(**batch, vision_feature_layer=layer)[0].tokens for layer in (-2, -3))
    assert torch.equal(usual, model.recover(**batch)[0].tokens)
    assert not torch.equal(usual[:, :1], other[:, :1])


@each_architecture
def test_a_max_length_below_the_prompt_is_refused(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    with pytest.raises(ValueError, match="max_length is 10, but the prompt has"):
        model.generate(**batch, max_length=10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 on 5.x
@each_architecture
def test_lora_leaves_the_vision_tower_alone_as_the_readme_says(architecture):
    config = LoraConfig(target_modules="all-linear", exclude_modules=r".*vision_tower.*")
    adapted = {name for name, _ in get_peft_model(architecture.build(), config).named_parameters() if "lora_" in name}
    assert adapted
    assert not any("vision_tower" in name or "token_recovery" in name for name in adapted)
