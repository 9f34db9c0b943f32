"""Calls that stock LLaVA takes: labels beside the model, feature layers of a call, models that are not compressed."""

import pytest
import tiny
import torch
from architectures import (
    ARCHITECTURES,
    OF_THE_STOCK_CONFIG,
    ROWS,
    call,
    each_architecture,
    generate,
    labels_of,
    stock_inputs,
)
from demo_model import demo_model
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import SynthIDTextWatermarkingConfig

from reccomp_hf.core import checks
from reccomp_hf.demo import draw_scene

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OFF = {"enabled": False}


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_shifted_labels_give_the_loss_of_labels(architecture, side):
    model, batch = architecture.compressed(), architecture.encode(side=side)
    labels = labels_of(model, batch)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(**batch, labels=labels).loss
    torch.testing.assert_close(model(**batch, labels=labels, shift_labels=shifted).loss, loss, **CLOSE)
    zeroed = model(**batch, labels=labels.masked_fill(labels > 0, 7), shift_labels=shifted).loss  # not read
    torch.testing.assert_close(zeroed, loss, **CLOSE)


@each_architecture
def test_labels_that_do_not_fit_or_do_not_arrive_are_refused(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    labels = labels_of(model, batch)
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=rf"{name} must have the shape of input_ids .*cut along with the prompts"):
            model(**batch, **{"labels": labels, name: labels[:, 1:]})
    with pytest.raises(ValueError, match=r"label_smoothing_factor or compute_loss_func.*compress_inputs"):
        model(**batch, num_items_in_batch=torch.tensor(5))
    assert model(**batch, num_items_in_batch=torch.tensor(5), token_recovery=OFF).logits is not None
    assert model(**batch, labels=labels, num_items_in_batch=torch.tensor(5)).loss > 0


@each_architecture
def test_generate_takes_the_feature_layer_of_a_call(architecture):
    model, stock, batch = architecture.compressed(), architecture.shared_stock(), architecture.encode()
    fields = {"vision_feature_layer": -3, "vision_feature_select_strategy": "default"}
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    ours = generate(model, batch, token_recovery=OFF, **fields, **wanted)
    theirs = generate(stock, stock_inputs(batch), **fields, **wanted)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.logits[0], theirs.logits[0])
    assert not torch.equal(generate(model, batch, token_recovery=OFF, **wanted).logits[0], ours.logits[0])
    text = {name: batch[name][2:3, -9:] for name in ("input_ids", "attention_mask")}
    assert torch.equal(generate(model, text, **fields), generate(model, text))


OTHER_FEATURES = {
    "last layer": {"vision_feature_layer": -1},
    "two layers": {"vision_feature_layer": [-2, -3]},
    "class token": {"vision_feature_select_strategy": "full"},
    "SigLIP": {
        "vision_feature_select_strategy": "full",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": tiny.IMAGE_SIZE,
            "patch_size": tiny.IMAGE_SIZE // 10,
        },
    },
}


OFF_MODELS = [
    (architecture, name)
    for architecture in ARCHITECTURES
    for name in OTHER_FEATURES
    if (architecture.name, name) != ("llava_next", "class token")  # stock LLaVA-NeXT cannot pack it
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "name"), OFF_MODELS, ids=[f"{architecture.name}-{name}" for architecture, name in OFF_MODELS]
)
def test_a_model_that_is_off_has_the_stock_limits(architecture, name):
    features = OTHER_FEATURES[name]
    fields = {
        name: value for name, value in architecture.stock().config.to_dict().items() if name not in OF_THE_STOCK_CONFIG
    }
    torch.manual_seed(0)
    stock = architecture.stock_class(architecture.stock_class.config_class(**{**fields, **features})).eval()
    fields = {name: value for name, value in stock.config.to_dict().items() if name not in OF_THE_STOCK_CONFIG}
    model = architecture.model_class(architecture.config_class(token_recovery=OFF, **fields)).eval()
    model.load_state_dict(stock.state_dict())
    settings = {name: value for name, value in features.items() if name == "vision_feature_select_strategy"}
    if "vision_config" in features:
        settings["num_additional_image_tokens"] = 0
    processor = architecture.processor(**settings)
    batch = dict(processor(**call(ROWS[:2]), return_tensors="pt", padding=True))
    assert torch.equal(model(**batch).logits, stock(**stock_inputs(batch)).logits)
    assert torch.equal(generate(model, batch), generate(stock, stock_inputs(batch)))
    reason = "vision tower is 'siglip" if "vision_config" in features else r"vision_feature_\w+ must be"
    with pytest.raises(ValueError, match=reason):
        model(**batch, token_recovery={"enabled": True})
    model.config.token_recovery = {"enabled": True}
    with pytest.raises(ValueError, match=reason):
        model(**batch)


SYNTHID = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=5, sampling_table_size=2**8)
PROMPT_READERS = {
    "SynthID": {"watermarking_config": SYNTHID, "do_sample": True, "top_k": 20},
    "guidance": {"guidance_scale": 1.5},
    "negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 40, 41, 42, 43]] * 2)},
}


@each_architecture
@pytest.mark.parametrize("options", PROMPT_READERS.values(), ids=PROMPT_READERS)
def test_watermarks_and_guidance_are_stock(architecture, options):
    """On whole images as on the stock model's prompt, on compressed ones as on the shortened prompt."""
    model, stock, batch = architecture.compressed(), architecture.stock(), architecture.encode(ROWS[::3])
    short, _ = model.compress_inputs(**batch, token_recovery={"budget": 8})
    short = {name: short[name] for name in ("input_ids", "inputs_embeds", "attention_mask")}
    for budget, expected in ((1.0, stock_inputs(batch)), (8, short)):
        new = []
        for one, call_inputs in ((stock, expected), (model, {**batch, "token_recovery": {"budget": budget}})):
            torch.manual_seed(0)
            new.append(generate(one, call_inputs, min_new_tokens=6, **options)[:, -6:])
        assert torch.equal(*new)
        torch.manual_seed(0)
        plain = {name: value for name, value in options.items() if name in ("do_sample", "top_k")}
        assert not torch.equal(generate(stock, expected, min_new_tokens=6, **plain)[:, -6:], new[0])


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@each_architecture
@pytest.mark.parametrize(
    "kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig], ids=lambda kind: kind.__name__
)
def test_virtual_tokens_before_images_are_refused(architecture, kind):
    """PEFT puts them before the prompt as embeddings or as a cache; off, and for text alone, they are read."""
    sizes = {"num_virtual_tokens": 4, "num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    sizes |= {"encoder_hidden_size": 16} if kind is PromptEncoderConfig else {}
    model = get_peft_model(architecture.build(), kind(task_type=TaskType.CAUSAL_LM, **sizes)).eval()
    batch = architecture.encode(ROWS[:1])
    for call_model in (model, model.generate):
        with pytest.raises(ValueError, match=r"PEFT's .* tuning .*another adapter, such as LoRA, or token_recovery="):
            call_model(**batch)
    text = {name: batch[name][:, -6:] for name in ("input_ids", "attention_mask")}
    assert generate(model, text, min_new_tokens=6).shape == (1, 12)
    assert model(**batch, token_recovery=OFF).logits.shape[0] == 1


@each_architecture
def test_settings_of_from_pretrained_stay_out_of_the_generation_config(architecture, tmp_path):
    """`from_pretrained` of a class passes its arguments to both configs: `enabled` of a call must still hold."""
    architecture.compressed().save_pretrained(tmp_path)
    model = architecture.model_class.from_pretrained(tmp_path, token_recovery={"budget": 9}).eval()
    assert model.config.token_recovery.budget == 9
    assert "token_recovery" not in model.generation_config.to_dict()
    batch = architecture.encode(ROWS[:1])
    expected = generate(architecture.shared_stock(), stock_inputs(batch))
    assert torch.equal(generate(model, batch, token_recovery=OFF), expected)
    assert not torch.equal(generate(model, batch), expected)
    model, info = architecture.model_class.from_pretrained(
        tmp_path, token_recovery={"budget": 9}, output_loading_info=True
    )
    assert not info["missing_keys"] and "token_recovery" not in model.generation_config.to_dict()


@torch.no_grad()
def test_an_empty_answer_to_text_of_ones_own_gets_a_hint_once(caplog):
    """A prompt without turns is no prompt that the demo model was trained on: it ends its answer at once."""
    model, processor = demo_model()
    checks.logger.warning_once.cache_clear()
    image, said = draw_scene(8).image, []
    for text in ("USER: <image>\n{} ASSISTANT:", "<image>\n{}", "<image>\n{}"):
        inputs = processor(images=image, text=text.format("What color is the triangle?"), return_tensors="pt")
        for options in ({}, {"return_dict_in_generate": True}, {"num_beams": 2}):
            new = generate(model, inputs, **options)
            new = getattr(new, "sequences", new)[:, inputs["input_ids"].shape[1] :]
            assert bool(processor.decode(new[0], skip_special_tokens=True)) == text.startswith("USER")
        said.append(caplog.text.count("The answer is empty"))
    assert said == [0, 1, 1]
    assert "processor.apply_chat_template(messages, add_generation_prompt=True)" in caplog.text
