"""Outputs, autocast and freezing, with and without compression."""

import contextlib
import inspect

import pytest
import torch
from architectures import CACHE, ROWS, each_architecture, generate, stock_inputs
from peft import LoraConfig, get_peft_model
from tiny import logged_warnings
from transformers import DynamicCache


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
@pytest.mark.parametrize("enabled", [True, False])
def test_projected_tokens_have_one_name_on_every_line(architecture, enabled):
    model, batch, setting = architecture.compressed(), architecture.encode(), {"enabled": enabled}
    short, _ = model.compress_inputs(**batch, token_recovery=setting)
    with logged_warnings() as logged:
        output = model(**batch, token_recovery=setting)
        tokens = output.image_hidden_states
        assert output["image_hidden_states"] is tokens
        assert tokens.shape == (int((short["input_ids"] == model.config.image_token_id).sum()), 32)
        if hasattr(output, "image_outputs"):
            features = output.image_outputs.pooler_output
            assert torch.equal(torch.cat(list(features)), tokens)
            if enabled:
                lengths = output.visual_token_counts + output.newline_counts
                assert [len(image) for image in features] == lengths.tolist()
        if not enabled:
            stock = architecture.shared_stock()(**stock_inputs(batch))
            encoded = getattr(stock, "image_outputs", None)
            expected = stock.image_hidden_states if encoded is None else torch.cat(list(encoded.pooler_output))
            assert torch.equal(tokens, expected)
        text = model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        assert text.image_hidden_states is None
        assert model(**batch, token_recovery=setting, return_dict=False)[0].shape == output.logits.shape
    assert logged == []
    assert output.keys() - {"logits"} <= set(model.config.keys_to_ignore_at_inference)


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_either_name(architecture, name):
    """The newer one everywhere, the older one as the stock method takes it."""
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    deprecated = name == "past_key_values" != CACHE

    def warned():
        warning = pytest.warns(FutureWarning, match="`past_key_values` is deprecated")
        return warning if deprecated else contextlib.nullcontext()

    cache = DynamicCache()
    with warned():
        output = model(**batch, **{name: cache}, use_cache=True)
    assert getattr(output, CACHE) is cache
    past = cache.get_seq_length()
    assert past == output.logits.shape[1]
    new = {"input_ids": batch["input_ids"][:, -4:], "attention_mask": torch.ones(1, past + 4, dtype=torch.long)}
    with warned():
        read_on = model(**new, **{name: cache}).logits[:, -1].argmax(-1)
    cache.crop(-4)
    with warned():
        generated = generate(model, new, new_tokens=1, min_new_tokens=1, **{name: cache})
    assert cache.get_seq_length() == past + 4
    assert torch.equal(generated[:, 4], read_on)
    with pytest.raises(ValueError, match=f"non-empty {CACHE}"):
        model.generate(**batch, **{name: cache})


@torch.no_grad()
@each_architecture
def test_encoded_pictures_of_the_stock_model_are_refused(architecture):
    model, batch = architecture.compressed(), stock_inputs(architecture.encode(ROWS[:1]))
    pixels = {name: batch.pop(name) for name in ("pixel_values", "image_sizes") if name in batch}
    stock = inspect.signature(architecture.shared_stock().forward).parameters
    encoded = {"image": model.get_image_features(**pixels, **({"return_dict": True} if CACHE == "cache" else {}))}
    off = {"token_recovery": {"enabled": False}}
    for call in (model, model.generate, architecture.base_class(model.config)):
        for pictures in ({}, pixels):
            with pytest.raises(ValueError, match=r"mm_encoder_outputs hold encoded images.*pass pixel_values"):
                call(**batch, **pictures, mm_encoder_outputs=encoded)
    if "mm_encoder_outputs" in stock:
        logits = model(**batch, mm_encoder_outputs=encoded, **off).logits
        assert torch.equal(logits, architecture.shared_stock()(**batch, **pixels).logits)


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
