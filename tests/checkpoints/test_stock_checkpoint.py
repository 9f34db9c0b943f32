"""Our classes read a stock LLaVA checkpoint as it is: visual-only, every weight its own, with one warning."""

import contextlib
import json
import logging
import re
import shutil

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, call, each_architecture, generate
from paths import DATA
from safetensors.torch import load_file, save_file
from saved import assert_bit_equal
from transformers import AutoModelForImageTextToText, AutoProcessor

import reccomp_hf

HINT = r"stock '\w+' checkpoint, read as visual-only.*reccomp_hf\.convert\(.*reccomp-hf convert"
LOGGERS = ("transformers", "reccomp_hf")
LINES = ("4x", "5x")
# Everything but what is ours, from the checkpoints of either line: the vision tower's keys differ between them.
OURS = ("token_recovery.",)


@contextlib.contextmanager
def log_lines():
    """Warnings of transformers and of the package."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


def stock_of_line(architecture, line, folder):
    """A stock checkpoint with the keys that a line writes, made of its checkpoint of ours."""
    source = DATA / f"checkpoint_{line}" / architecture.name
    folder.mkdir()
    weights = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith(OURS)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("token_recovery")
    config |= {"model_type": architecture.name, "architectures": [architecture.stock_class.__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "generation_config.json", folder)
    architecture.stock_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stock folders by architecture and writer: the running line, and files of either line."""
    root, found = tmp_path_factory.mktemp("stock"), {}
    for architecture in ARCHITECTURES:
        found[architecture.name, "here"] = architecture.save_sources(root / architecture.name)[0]
        for line in LINES:
            found[architecture.name, line] = stock_of_line(architecture, line, root / f"{architecture.name}-{line}")
    return found


def by_bare_name(weights):
    """Weights by what layouts have in common: where `model` and the like stand differs between files and modules."""
    wrappers = ("model", "language_model", "vision_model")
    named = {".".join(part for part in name.split(".") if part not in wrappers): weights[name] for name in weights}
    assert len(named) == len(weights)
    return named


each_writer = pytest.mark.parametrize("writer", ["here", *LINES])


@each_architecture
@each_writer
def test_every_weight_is_the_stock_one(architecture, writer, folders):
    folder = folders[architecture.name, writer]
    with log_lines() as lines:
        ours, info = architecture.model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.state_dict().keys() == architecture.shared_stock().state_dict().keys()
    weights, wanted = by_bare_name(ours.state_dict()), by_bare_name(load_file(folder / "model.safetensors"))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(value.to(weights[name].dtype), weights[name]) for name, value in wanted.items())
    assert len(lines) == 1, lines
    assert lines[0].startswith(str(folder))
    assert re.search(HINT, lines[0])
    assert ours.generation_config.eos_token_id == 2
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(stock) is architecture.stock_class  # what others load is not touched


@torch.no_grad()
@each_architecture
@each_writer
def test_the_model_without_head(architecture, writer, folders):
    folder = folders[architecture.name, writer]
    with log_lines() as lines:
        base = architecture.base_class.from_pretrained(folder)
    assert len(lines) == 1, lines
    whole = architecture.model_class.from_pretrained(folder)
    weights = whole.state_dict()
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in base.state_dict().items())
    batch = architecture.encode()
    states = whole(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(base(**batch).last_hidden_state, states, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@each_architecture
def test_it_compresses_by_what_is_seen_and_off_it_is_stock(architecture, folders):
    folder = folders[architecture.name, "here"]
    processor = architecture.processor_class.from_pretrained(folder)
    assert type(processor) is architecture.processor_class
    assert processor.recovery_tokenizer is None
    batch = processor(**call(), return_tensors="pt", padding=True)
    stock, ours = architecture.stock_class.from_pretrained(folder), architecture.model_class.from_pretrained(folder)
    wanted = AutoProcessor.from_pretrained(folder)(**call(), return_tensors="pt", padding=True)
    assert all(torch.equal(value, batch[name]) for name, value in wanted.items())
    assert batch.keys() == wanted.keys()
    off = ours(**batch, token_recovery={"enabled": False})
    assert torch.equal(off.logits, stock(**wanted).logits)
    assert ours.config.token_recovery == reccomp_hf.TokenRecoveryConfig()
    assert not any(record.text_mask.any() for record in ours.recover(**batch))
    full = (batch["input_ids"] == ours.config.image_token_id).sum()
    assert 0 < ours(**batch).visual_token_counts.sum() < full
    assert generate(ours, batch).shape[0] == len(batch["input_ids"])


@torch.no_grad()
@each_architecture
def test_fields_can_be_given(architecture, folders):
    folder = folders[architecture.name, "here"]
    model = architecture.model_class.from_pretrained(folder, token_recovery={"budget": 9, "merged_tokens": 2})
    section = model.config.token_recovery
    assert section == reccomp_hf.TokenRecoveryConfig(budget=9, merged_tokens=2)
    assert set(model(**architecture.encode()).visual_token_counts.tolist()) == {9}
    section = reccomp_hf.TokenRecoveryConfig.from_preset("balanced", budget=7)
    model = architecture.model_class.from_pretrained(folder, token_recovery=section, dtype=torch.float16)
    assert model.config.token_recovery == section
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16}
    with pytest.raises(ValueError, match=r"Unknown token_recovery field 'bugdet'; did you mean 'budget'"):
        architecture.model_class.from_pretrained(folder, token_recovery={"bugdet": 9})


@each_architecture
def test_a_text_encoder_is_never_random(architecture, folders):
    section = {"text_encoder_config": architecture.text_config()}
    with pytest.raises(ValueError, match=r"lacks \d+ weights .*token_recovery.*reccomp_hf\.convert"):
        architecture.model_class.from_pretrained(folders[architecture.name, "here"], token_recovery=section)


@each_architecture
@each_writer
def test_saving_makes_a_checkpoint_of_ours(architecture, writer, folders, tmp_path):
    folder = folders[architecture.name, writer]
    model = architecture.model_class.from_pretrained(folder, token_recovery={"budget": 12})
    model.save_pretrained(tmp_path)
    architecture.processor_class.from_pretrained(folder).save_pretrained(tmp_path)
    with log_lines() as lines:
        again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(tmp_path)
    assert [line for line in lines if "slow image processor" not in line] == []
    assert not any(info.values()), info
    assert (type(again), type(processor)) == (architecture.model_class, architecture.processor_class)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == architecture.config_class.model_type
    assert config["architectures"] == [architecture.model_class.__name__]
    assert config["token_recovery"]["budget"] == 12
    assert config["token_recovery"]["text_encoder_config"] is None
    assert_bit_equal(again, model)
    batch = processor(**call(), return_tensors="pt", padding=True)
    assert torch.equal(generate(model, batch), generate(again, batch))


@each_architecture
def test_the_config_alone(architecture, folders):
    folder = folders[architecture.name, "here"]
    with log_lines() as lines:
        config = architecture.config_class.from_pretrained(folder)
    assert len(lines) == 1
    assert config.model_type == architecture.config_class.model_type
    assert config.architectures is None
    stock = architecture.stock_class.config_class.from_pretrained(folder)
    assert config.text_config.to_dict() == stock.text_config.to_dict()
    assert config.image_token_id == stock.image_token_id


@each_architecture
def test_another_family_is_refused(architecture, folders, tmp_path):
    other = next(row for row in ARCHITECTURES if row is not architecture)
    with pytest.raises(ValueError, match=rf"model_type '{other.name}'; {architecture.config_class.__name__} reads"):
        architecture.model_class.from_pretrained(folders[other.name, "here"])
    other.compressed().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model_type '{other.name}_reccomp'; .* and stock '{architecture.name}'"):
        architecture.base_class.from_pretrained(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'llama'"):
        architecture.config_class.from_pretrained(tmp_path)


@each_architecture
@each_writer
def test_a_lost_weight_is_an_error(architecture, writer, folders, tmp_path):
    folder = folders[architecture.name, writer]
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("language_model.lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of \w+, which would be random: lm_head\.weight"):
        architecture.model_class.from_pretrained(tmp_path)
