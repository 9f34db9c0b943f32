"""Converting says what is wrong with its sources, before anything is written."""

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import reccomp_hf
from reccomp_hf import cli
from reccomp_hf.demo import checkpoint_folder


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("./nowhere", "{clip}"), "llava: there is no folder ./nowhere"),
        (("{llava}", "./nowhere"), "clip: there is no folder ./nowhere"),
        (("{llava}", "{llava}"), "clip must be of model_type 'clip', got 'llava'"),
        (("{clip}", "{clip}"), "llava must be of model_type 'llava' or 'llava_next', got 'clip'"),
    ],
)
def test_convert_says_which_source_is_wrong(sources, message, tmp_path, capsys):
    folders = {name: str(checkpoint_folder(name)) for name in ("llava", "clip")}
    code = cli.main(["convert", *(source.format(**folders) for source in sources), str(tmp_path / "out")])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_authors_method_needs_a_clip(tmp_path, capsys):
    llava = str(checkpoint_folder("llava"))
    assert cli.main(["convert", llava, str(tmp_path / "out"), "--visual-only", "--preset", "authors"]) == 2
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
