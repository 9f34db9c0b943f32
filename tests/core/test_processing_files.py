import json
import os
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from paths import DATA
from tiny import turn
from transformers import LlavaProcessor
from transformers.utils import hub

from reccomp_hf.core import compat, processing, recovery_tokenizer
from reccomp_hf.core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from reccomp_hf.core.words import encode_words

FIXTURES = ["processor_4x", "processor_5x"]
PICTURE = tiny.pictures(1)
QUESTION = "What is the colour of the square?"
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"


@pytest.mark.parametrize("cls", [LlavaRecCompProcessor, LlavaNextRecCompProcessor])
@pytest.mark.parametrize("subfolder", ["", "processor"])
def test_round_trip(cls, subfolder, tmp_path):
    processor = tiny.recovery_processor(cls, recovery_max_length=32)
    processor.save_pretrained(tmp_path / subfolder)
    with tiny.logged_warnings() as logged:
        loaded = cls.from_pretrained(tmp_path, **({"subfolder": subfolder} if subfolder else {}))
    assert [line for line in logged if "slow image processor" not in line] == []
    assert loaded.to_dict() == processor.to_dict()
    assert json.loads((tmp_path / subfolder / "processor_config.json").read_text())["recovery_max_length"] == 32
    assert type(loaded.recovery_tokenizer) is type(processor.recovery_tokenizer)
    assert loaded.chat_template == processor.chat_template
    inputs = {"images": tiny.pictures(2), "text": [PROMPT, PROMPT], "return_tensors": "pt", "padding": True}
    ours, theirs = loaded(**inputs), processor(**inputs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_round_trip_of_a_visual_only_processor(tmp_path):
    tiny.recovery_processor(recovery_tokenizer=None).save_pretrained(tmp_path)
    assert not (tmp_path / "recovery_tokenizer").exists()
    assert LlavaRecCompProcessor.from_pretrained(tmp_path).recovery_tokenizer is None


def test_missing_recovery_tokenizer_is_an_error(tmp_path):
    tiny.recovery_processor().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "recovery_tokenizer")
    with pytest.raises(OSError, match=r"no recovery_tokenizer/tokenizer_config\.json"):
        LlavaRecCompProcessor.from_pretrained(tmp_path)
    loaded = LlavaRecCompProcessor.from_pretrained(tmp_path, recovery_tokenizer=tiny.clip_tokenizer())
    assert loaded.recovery_max_length == 77


def test_stock_folder_gets_a_recovery_tokenizer(tmp_path):
    tiny.stock_processor().save_pretrained(tmp_path / "stock")
    assert LlavaRecCompProcessor.from_pretrained(tmp_path / "stock").recovery_tokenizer is None
    loaded = LlavaRecCompProcessor.from_pretrained(tmp_path / "stock", recovery_tokenizer=tiny.clip_tokenizer())
    loaded.save_pretrained(tmp_path / "ours")
    assert LlavaRecCompProcessor.from_pretrained(tmp_path / "ours").to_dict() == loaded.to_dict()


def test_hub_arguments_reach_the_sub_folder(tmp_path, monkeypatch):
    tiny.recovery_processor().save_pretrained(tmp_path)
    seen = {}
    monkeypatch.setattr(recovery_tokenizer, "cached_file", lambda *args, **kwargs: seen.update(kwargs))
    with pytest.raises(OSError, match="no recovery_tokenizer"):
        LlavaRecCompProcessor.from_pretrained(
            tmp_path, cache_dir="cache", local_files_only=True, token="secret", revision="main"
        )
    expected = {"cache_dir": "cache", "local_files_only": True, "token": "secret", "force_download": False}
    assert expected.items() <= seen.items()
    assert "revision" in seen


@pytest.mark.parametrize("again", [False, True])
def test_push_to_hub_uploads_the_sub_folder(again, tmp_path, monkeypatch):
    commits = []

    def create_commit(**kwargs):
        commits.append((kwargs["repo_id"], kwargs["commit_message"], {op.path_in_repo for op in kwargs["operations"]}))

    if hasattr(hub, "create_commit"):  # transformers 4
        monkeypatch.setattr(hub, "create_commit", create_commit)
    else:
        monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(create_commit=create_commit))
    monkeypatch.setattr(processing, "create_repo", lambda name, **kwargs: SimpleNamespace(repo_id=f"me/{name}"))
    processor, folder = tiny.recovery_processor(), tmp_path / "folder"
    if again:
        processor.save_pretrained(folder)
        for path in folder.rglob("*"):
            os.utime(path, (1, 1))
    processor.save_pretrained(folder, push_to_hub=True, repo_id="it", commit_message="new")
    ((repository, message, paths),) = commits
    assert (repository, message) == ("me/it", "new")
    expected = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert paths == expected >= {"processor_config.json", "recovery_tokenizer/tokenizer.json"}


def test_tokenizer_config_is_readable_on_both_lines(tmp_path):
    processor = tiny.recovery_processor()
    processor.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.llm_tokenizer().backend_tokenizer,
        extra_special_tokens={"image_token": "<image>"},
        bos_token="<s>",
    )
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["extra_special_tokens"] == {"image_token": "<image>"}
    assert LlavaRecCompProcessor.from_pretrained(tmp_path).tokenizer.image_token == "<image>"


@pytest.mark.parametrize("tokens", [[], ["<image>"]])
def test_unnamed_special_tokens_are_renamed(tokens, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": tokens}))
    compat.mend_tokenizer_config(str(tmp_path))
    expected = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"additional_special_tokens": tokens} if tokens else {}),
    }
    assert json.loads(path.read_text()) == expected


# tests/data/processor_4x and processor_5x were written by the two lines (4.57.6 and 5.23.0), with
# `python -c "import test_processing_files as t; t.write_fixture('processor_4x')"`; the expected encoding by the first.


def encode_fixture(processor):
    messages = [[turn("user", QUESTION, PICTURE)], [turn("user", "Why? " * 60)]]
    encoding = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs={"padding": True}
    )
    pixels = np.array(encoding.pop("pixel_values"))[0, :, ::9, ::9].round(3).tolist()
    return {**{name: encoding[name] for name in encoding}, "pixels": pixels, "template": processor.chat_template}


def write_fixture(name):
    """Write tests/data/<name> with the transformers at hand, and processor_expected.json if there is none."""
    processor = tiny.recovery_processor()
    processor.save_pretrained(DATA / name)
    if not (DATA / "processor_expected.json").exists():
        (DATA / "processor_expected.json").write_text(json.dumps(encode_fixture(processor)) + "\n")


@pytest.mark.parametrize("name", FIXTURES)
def test_folder_of_either_line_gives_the_same_encoding(name):
    processor = LlavaRecCompProcessor.from_pretrained(DATA / name)
    expected = json.loads((DATA / "processor_expected.json").read_text())
    encoding = encode_fixture(processor)
    words = encode_words(tiny.llm_tokenizer(), [QUESTION, "Why? " * 60])
    assert encoding.pop("recovery_words") == words.tolist()
    np.testing.assert_allclose(encoding.pop("pixels"), expected.pop("pixels"), atol=2e-3)
    assert encoding == expected
    assert processor.recovery_max_length == 77
    assert processor.tokenizer.padding_side == "left"


def test_stock_and_clip_share_the_vision_tower(tmp_path):
    llava = tiny.save_stock(tmp_path / "llava")
    clip = tiny.save_clip(tmp_path / "clip")
    inputs = LlavaProcessor.from_pretrained(tmp_path / "llava")(
        tiny.pictures(1), PROMPT, return_tensors="pt", add_special_tokens=True
    )
    assert (inputs["input_ids"] == llava.config.image_token_index).sum() == tiny.PATCHES
    with torch.no_grad():
        assert llava(**inputs).logits.shape[-1] == len(tiny.llm_tokenizer())
        pixels = inputs["pixel_values"]
        ours, theirs = (vision(pixels)[0] for vision in (llava.model.vision_tower, clip.vision_model))
    assert torch.equal(ours, theirs)


def test_connections_are_refused():
    with socket.socket() as connection, pytest.raises(RuntimeError, match="must not use the network"):
        connection.connect(("127.0.0.1", 9))
