"""What stands on the Hub loads as any model does: Auto classes, pipeline, revisions, and `push_to_hub` itself."""

import json

import hub_client
import pytest
import tiny
import torch
from architectures import LLAVA, each_architecture, prompt_of
from fake_hub_store import Blob
from huggingface_hub import HfApi
from saved import save_checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

import reccomp_hf
from reccomp_hf.checkpoints import hub as checkpoints_hub
from reccomp_hf.checkpoints import loading
from reccomp_hf.core.remote_code import flat_sources

# huggingface_hub 2.x uploads by `data=` where there is no Xet storage, which its own HTTP library deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The class `AutoModelForVision2Seq` is deprecated:FutureWarning"),
]
QUESTION = tiny.SENTENCES[0]
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


def logits_of(name, auto=AutoModelForImageTextToText, **kwargs):
    """What a checkpoint's own processor and model make of a picture."""
    model, info = auto.from_pretrained(name, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(name, **kwargs)
    inputs = processor(images=tiny.pictures(1)[0], text=prompt_of(QUESTION, 1), return_tensors="pt")
    assert "recovery_input_ids" in inputs
    with torch.no_grad():
        return model(**inputs).logits


@each_architecture
def test_loaded_by_its_name(hub, tmp_path, monkeypatch, architecture):
    folder = save_checkpoint(tmp_path / "model", architecture, budget=12)
    (folder / "README.md").write_text(CARD)
    first = checkpoints_hub.push(folder, "me/model", revision="main").commit
    old = logits_of(folder)
    with torch.no_grad():
        model = architecture.build(budget=30)
        model.get_output_embeddings().weight.mul_(2)
    model.save_pretrained(folder)
    checkpoints_hub.push(folder, "me/model")
    new = logits_of(folder)
    assert old.shape != new.shape
    for auto in (AutoModelForImageTextToText, reccomp_hf.AutoModelForVision2Seq):
        assert torch.equal(logits_of("me/model", auto), new)
    assert torch.equal(logits_of("me/model", revision=first), old)
    assert AutoConfig.from_pretrained("me/model", revision=first).token_recovery.budget == 12
    assert type(AutoProcessor.from_pretrained("me/model")) is architecture.processor_class
    hub.log.clear()
    with hub_client.offline(monkeypatch):
        assert torch.equal(logits_of("me/model"), new)
    assert hub.log == []


def test_the_pipeline_by_its_name(hub, tmp_path):
    folder = save_checkpoint(tmp_path / "model", budget=12)
    (folder / "README.md").write_text(CARD)
    checkpoints_hub.push(folder, "me/model", private=True)
    chat = [tiny.turn("user", QUESTION, tiny.pictures(1))]
    answers = []
    for name in ("me/model", str(folder)):
        pipe = pipeline("image-text-to-text", model=name)
        assert type(pipe.model) is LLAVA.model_class
        [result] = pipe(text=chat, generate_kwargs={"max_new_tokens": 4, "do_sample": False}, return_full_text=False)
        answers.append(result["generated_text"])
    assert answers[0] == answers[1]


def test_loaded_by_a_commands_name(hub, tmp_path):
    """Weights are downloaded once the description fits, and only if some are missing."""
    folder = save_checkpoint(tmp_path / "model", shard="100KB", budget=12)
    hub.make("me/model", folder)
    with pytest.raises(ValueError, match="bugdet"):
        loading.load("me/model", {"bugdet": 7}, device="cpu")
    LLAVA.shared_stock().save_pretrained(tmp_path / "stock")
    hub.make("me/stock", tmp_path / "stock")
    with pytest.raises(ValueError, match="is a stock LLaVA"):
        loading.load("me/stock", {}, device="cpu")
    assert not [path for _, path, *_ in hub.requests("GET", "me/stock") if "safetensors" in path]
    encoder, _ = loading.load_encoder("me/model", {"budget": 7}, device="cpu")
    assert type(encoder) is LLAVA.base_class and encoder.config.token_recovery.budget == 7
    assert len(encoder.language_model.layers) == 0
    hub.log.clear()
    model, processor = loading.load("me/model", {}, device="cpu", dtype="bfloat16")
    assert type(model) is LLAVA.model_class and not model.training and model.dtype == torch.bfloat16
    assert type(processor) is LLAVA.processor_class
    assert not hub.requests("GET", ".safetensors")
    with pytest.raises(ValueError, match=r"Device 'tpu' cannot be used here \(.*Use --device cpu"):
        loading.load(str(folder), {}, device="tpu")


def test_the_hub_lists_what_was_pushed(hub, tmp_path):
    folder = save_checkpoint(tmp_path / "model", budget=12)
    (folder / "README.md").write_text(CARD)
    pushed = checkpoints_hub.push(folder, "me/model", message="Mine")
    api = HfApi()
    assert [model.id for model in api.list_models(author="me")] == ["me/model"]
    files = api.list_repo_files("me/model")
    assert {"config.json", "model.safetensors", "recovery_tokenizer/tokenizer.json", "README.md"} <= {*files}
    commits = api.list_repo_commits("me/model")
    assert [commit.title for commit in commits] == ["Mine", "initial commit"]
    assert commits[0].commit_id == pushed.commit == api.model_info("me/model").sha


@each_architecture
def test_push_to_hub_of_model_and_processor(hub, tmp_path, architecture):
    model, processor = architecture.compressed(), architecture.processor()
    model.push_to_hub("me/model", private=True)
    processor.push_to_hub("me/model", commit_message="And its processor")
    repo = hub.repos["me/model"]
    assert repo.private
    assert repo.at("main").title == "And its processor"
    files = repo.files()
    config = json.loads(files["config.json"])
    assert config["model_type"] == architecture.config_class.model_type
    assert {"recovery_tokenizer/tokenizer.json", "tokenizer.json", "processor_config.json"} <= files.keys()
    assert {value.partition(".")[0] + ".py" for value in config["auto_map"].values()} <= files.keys()
    folder = save_checkpoint(tmp_path / "model", architecture)
    assert torch.equal(logits_of("me/model"), logits_of(folder))


def test_a_config_that_is_saved_and_pushed_brings_its_code(hub, tmp_path):
    LLAVA.compressed().config.save_pretrained(str(tmp_path / "config"), push_to_hub=True, repo_id="me/config")
    assert flat_sources().keys() < {*HfApi().list_repo_files("me/config")}


def test_push_to_hub_again_keeps_the_card(hub):
    LLAVA.compressed().push_to_hub("me/model")
    repo = hub.repos["me/model"]
    repo.commit("main", "a card", {**repo.at("main").tree, "README.md": Blob(CARD.encode(), large=False)})
    LLAVA.compressed().push_to_hub("me/model", revision="later")
    assert repo.branches.keys() == {"main", "later"}
    assert repo.files("later")["README.md"] == CARD.encode()
