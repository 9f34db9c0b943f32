"""Converting says what is wrong with its sources, before anything is written."""

import pytest
import tiny
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
