"""A tokenizer that does not belong to its model is refused wherever one is read."""

import json
import shutil

import pytest
import tiny
from architectures import LLAVA, each_architecture
from conversions import converted, copies, leave_cards_unmeasured
from transformers import AutoProcessor, BatchEncoding, CLIPTextConfig

import reccomp_hf
from reccomp_hf.checkpoints import hub as package_hub
from reccomp_hf.checkpoints.loading import load
from reccomp_hf.cli import main as cli
from reccomp_hf.core.compat import IS_V5
from reccomp_hf.core.questions import check_prompt_tokenizer, check_question_tokenizer

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json")


@pytest.fixture(autouse=True)
def unmeasured_cards(monkeypatch):
    leave_cards_unmeasured(monkeypatch)


def remove_tokenizer(folder, *kept):
    for name in {*FILES, "tokenizer_config.json"} - {*kept}:
        (folder / name).unlink(missing_ok=True)


def test_a_clip_without_tokenizer_files_is_not_converted(tmp_path, capsys):
    llava, clip = copies(tmp_path / "sources")
    remove_tokenizer(clip)
    for options in ([], ["--dry-run"]):
        assert cli.main(["convert", str(llava), str(clip), str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("reccomp-hf: error: ") and "tokenizer" in error
        if IS_V5:  # 4.57 cannot build a tokenizer without files
            assert (
                "The recovery tokenizer has 2 tokens, but the model's vocabulary has 689. Use the tokenizer" in error
            )
    assert not (tmp_path / "out").exists()


@each_architecture
@pytest.mark.parametrize("place", [".", "recovery_tokenizer"])
def test_a_checkpoint_without_a_tokenizers_files_is_not_read(architecture, place, tmp_path, capsys):
    folder = shutil.copytree(converted(architecture), tmp_path / "model")
    remove_tokenizer(folder / place, "tokenizer_config.json")
    for read in (
        AutoProcessor.from_pretrained,
        lambda path: load(str(path), {}),
        lambda path: package_hub.push(path, "me/model"),
    ):
        with pytest.raises((ValueError, ImportError), match=r"tokenizer|protobuf|sentencepiece"):
            read(folder)
    assert cli.main(["info", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


def test_another_models_tokenizer_is_not_read(tmp_path):
    folder = shutil.copytree(converted(LLAVA), tmp_path / "model")
    shutil.rmtree(folder / "recovery_tokenizer")
    tiny.llm_tokenizer().save_pretrained(folder / "recovery_tokenizer")
    with pytest.raises(ValueError, match=r"model: The recovery tokenizer has \d+ tokens"):
        AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model: The recovery tokenizer has \d+ tokens"):
        AutoProcessor.from_pretrained(folder, recovery_tokenizer=tiny.llm_tokenizer())
    assert AutoProcessor.from_pretrained(folder, recovery_tokenizer=tiny.clip_tokenizer()) is not None


def test_a_processor_without_a_config_is_read(tmp_path):
    tiny.recovery_processor().save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).recovery_tokenizer is not None


ENCODER = tiny.clip_config().text_config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 688}, "has 689 tokens, but the model's vocabulary has 688"),
        ({"vocab_size": 49408}, "has 689 tokens, but the model's vocabulary has 49408"),
        ({"eos_token_id": 5}, "asks for start and end of text 687 and 5: got 687 and 688"),
        ({"bos_token_id": 5}, "asks for start and end of text 5 and 688: got 687 and 688"),
        ({}, None),
        ({"vocab_size": 704}, None),  # padded
        ({"bos_token_id": 0, "eos_token_id": 2}, None),  # as in OpenAI's configs
    ],
)
def test_start_end_and_length_are_the_text_encoders(change, message):
    encoder = CLIPTextConfig(**{**ENCODER, **change}).to_dict()
    if message is None:
        check_question_tokenizer(tiny.clip_tokenizer(), encoder)
        return
    with pytest.raises(ValueError, match=message):
        check_question_tokenizer(tiny.clip_tokenizer(), encoder)


@pytest.mark.parametrize(
    ("vocabulary", "token", "token_id", "message"),
    [
        (428, "<image>", 428, "image_token_id 428 is outside the language model's vocabulary of 428"),
        (428, "<image>", 5, "'<image>' must be the one id 5, got"),
        (428, "<picture>", 4, "'<picture>' must be the one id 4, got"),
        (32000, "<image>", 4, "LLaVA's tokenizer has .* tokens, but the model's vocabulary has 32000"),
        (100, "<image>", 4, "LLaVA's tokenizer has .* tokens, but the model's vocabulary has 100"),
    ],
)
def test_vocabulary_and_image_token_are_the_llavas(vocabulary, token, token_id, message):
    tokenizer = tiny.llm_tokenizer()
    vocabulary = len(tokenizer) if vocabulary == 428 else vocabulary
    token_id = vocabulary if token_id == 428 else token_id
    with pytest.raises(ValueError, match=message.replace("428", str(vocabulary))):
        check_prompt_tokenizer(tokenizer, vocabulary, token, token_id)


def test_a_tokenizer_that_knows_no_word_is_refused():
    class Deaf:
        bos_token_id, eos_token_id = 0, 1

        def __len__(self):
            return 689

        def __call__(self, texts, **kwargs):
            return BatchEncoding({"input_ids": [[7]] * len(texts)})

    with pytest.raises(ValueError, match=r"encodes 'Is there a red circle.*' and 'How many .*' as the same ids"):
        check_question_tokenizer(Deaf(), {**ENCODER, "bos_token_id": 0, "eos_token_id": 1})


def test_another_image_token_is_refused_before_weights_are_read(tmp_path, capsys):
    llava, clip = copies(tmp_path / "sources")
    fields = json.loads((llava / "config.json").read_text())
    name = "image_token_index" if "image_token_index" in fields else "image_token_id"
    for token_id, message in ((5, "must be the one id 5"), (10**6, "is outside the language model's vocabulary")):
        (llava / "config.json").write_text(json.dumps({**fields, name: token_id}))
        for options in ([], ["--dry-run"]):
            assert cli.main(["convert", str(llava), str(clip), str(tmp_path / "out"), *options]) == 2
            assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="outside the language model's vocabulary"):
        reccomp_hf.convert(llava, clip, tmp_path / "out")


COMMANDS = (["info"], ["card", "--stdout"], ["cost"], ["embed"], ["push"], ["convert"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_no_command_runs_or_offers_to_run_a_checkpoints_code(name, command, tmp_path, capsys, monkeypatch):
    def ask(*arguments):
        raise AssertionError("the command asks whether to run the checkpoint's code")

    monkeypatch.setattr("builtins.input", ask)
    folder = shutil.copytree(converted(LLAVA), tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    fields = json.loads((folder / name).read_text())
    if name == "config.json":
        fields |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    else:
        fields |= {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
    (folder / name).write_text(json.dumps(fields))
    tiny.pictures(1)[0].save(tmp_path / "picture.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "picture.png", "question": "What is it?"}))
    out = str(tmp_path / "out")
    after = {"push": ["me/model"], "convert": [out, "--visual-only"], "embed": [str(tmp_path / "rows.jsonl"), out]}
    code = cli.main([command[0], str(folder), *after.get(command[0], []), *command[1:]])
    out, err = capsys.readouterr()
    assert not (tmp_path / "ran").exists() and "trust_remote_code" not in out + err and "[y/N]" not in out + err
    if name == "config.json" or command[0] in ("info", "embed", "push"):
        assert code == 2 and "error" in err
