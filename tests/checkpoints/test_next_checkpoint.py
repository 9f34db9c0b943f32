"""A LLaVA-NeXT that the stock class wrote, converted: what decides the layout of its pictures survives."""

import json

import pytest
import tiny
import torch
from architectures import generate, prompt_of, stock_inputs
from next_model import MIXED, NEXT, PINPOINTS, TEXTS, encode, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import reccomp_hf

QUESTION = tiny.SENTENCES[0]


@pytest.fixture(scope="module", params=TEXTS)
def folders(request, tmp_path_factory):
    """Stock and converted folder, whose pictures are cut by `PINPOINTS`."""
    folder = tmp_path_factory.mktemp(request.param)
    stock, clip = TEXTS[request.param].save_sources(folder)
    processor = tiny.stock_next_processor()
    processor.image_processor.image_grid_pinpoints = PINPOINTS
    processor.save_pretrained(stock)
    return stock, reccomp_hf.convert(stock, clip, folder / "converted", budget=24)


def test_the_newline_arrives_bit_for_bit(folders):
    stock = NEXT.stock_class.from_pretrained(folders[0])
    ours, info = AutoModelForImageTextToText.from_pretrained(folders[1], output_loading_info=True)
    assert type(ours) is NEXT.model_class
    assert not any(info.values()), info
    assert torch.equal(ours.model.image_newline, stock.model.image_newline)
    assert ours.model.image_newline.abs().sum() > 0
    wanted = stock.state_dict()
    assert {name for name in ours.state_dict() if not name.startswith("token_recovery")} == wanted.keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in wanted.items())
    assert type(ours.config.text_config) is type(stock.config.text_config)


def test_the_config_keeps_what_decides_the_layout(folders, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folders[1])
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for config in (model.config, again.config):
        assert config.model_type == "llava_next_reccomp"
        assert [list(size) for size in config.image_grid_pinpoints] == PINPOINTS
        assert config.token_recovery.budget == 24
        assert config.vision_feature_select_strategy == "default"
    written = [json.loads((folder / "config.json").read_text()) for folder in (folders[1], tmp_path)]
    assert written[0]["token_recovery"] == written[1]["token_recovery"]
    batch = encode(MIXED)
    with torch.no_grad():
        # Not bitwise: weights are views of their files, whose headers differ in length, and kernels see alignment.
        torch.testing.assert_close(model(**batch).logits, again(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_processor_counts_as_upstream(folders):
    ours, upstream = (AutoProcessor.from_pretrained(folder) for folder in folders[::-1])
    assert type(ours) is NEXT.processor_class
    assert [list(size) for size in ours.image_processor.image_grid_pinpoints] == PINPOINTS
    batch, wanted = encode(MIXED, processor=ours), encode(MIXED, processor=upstream)
    assert all(torch.equal(batch[name], value) for name, value in wanted.items())
    added = {"recovery_input_ids", "recovery_attention_mask", "recovery_words"}
    assert {name for name in batch if name not in wanted} == added


def test_what_was_loaded_runs_as_stock_when_switched_off(folders):
    stock = NEXT.stock_class.from_pretrained(folders[0])
    ours = AutoModelForImageTextToText.from_pretrained(folders[1])
    batch = encode(MIXED, processor=AutoProcessor.from_pretrained(folders[1]))
    with torch.no_grad():
        off = ours(**batch, token_recovery={"enabled": False})
        assert torch.equal(off.logits, stock(**stock_inputs(batch)).logits)
        assert ours(**batch).visual_token_counts.tolist() == [24] * len(batch["image_sizes"])


def test_the_pipeline_reads_pictures_of_every_size(folders):
    pipe = pipeline("image-text-to-text", model=str(folders[1]))
    assert type(pipe.model) is NEXT.model_class
    for name in ("tall", "wide", "large"):
        chat = [tiny.turn("user", QUESTION, [picture(name)])]
        [result] = pipe(text=chat, generate_kwargs={"max_new_tokens": 4, "do_sample": False}, return_full_text=False)
        prompt = prompt_of(QUESTION, 1).replace("<image>", "<image>\n").replace("\n\n", "\n")
        inputs = pipe.processor(images=picture(name), text=prompt, recovery_text=[QUESTION], return_tensors="pt")
        ids = generate(pipe.model, inputs, new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        assert result["generated_text"] == pipe.processor.decode(ids, skip_special_tokens=True)
