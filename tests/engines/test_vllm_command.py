"""Commands with `--engine vllm` where they need no engine: what is refused, and the digest of a checkpoint."""

import json
import types

import pytest
from predictions import save_pictures, write_lines
from safetensors.torch import load_file, save_file
from vllm_engines import copy_checkpoint

from reccomp_hf.checkpoints.digest import checkpoint_digest
from reccomp_hf.demo import checkpoint_folder
from reccomp_hf.engines.vllm import prediction, starting

pytest_plugins = ("command_line",)


@pytest.fixture
def command(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", save_pictures(tmp_path, 1))
    return ["predict", data, "--model", "demo", "--engine", "vllm", "--output", tmp_path / "out.jsonl"]


@pytest.mark.parametrize("option", [["--device", "cpu"], ["--cuda-graph"]], ids=str)
def test_an_option_that_vllm_does_not_have_is_refused(error, command, option):
    message = error(*command, *option)
    assert message.startswith(f"{option[0]} is an option of the engine transformers")
    assert "--preset, --budget, --set, --dtype, --batch-size, --max-new-tokens" in message


def test_without_vllm_the_error_says_how_to_install_it(error, command, monkeypatch):
    monkeypatch.setattr(starting, "find_spec", lambda name: None)
    assert error(*command).startswith("vLLM is not installed: pip install 'reccomp_hf[vllm]'")


def test_several_processes_are_refused_before_an_engine_starts(error, command, monkeypatch, tmp_path):
    monkeypatch.setattr(prediction, "process_state", lambda device: types.SimpleNamespace(num_processes=2))
    monkeypatch.setattr(starting, "start_engine", lambda *arguments: pytest.fail("an engine was started"))
    refusal = "vLLM answers in one process, got 2: start the command without accelerate or torchrun."
    with pytest.raises(ValueError, match=refusal):
        prediction.predict_with_vllm(None, tmp_path, tmp_path / "out.jsonl")
    assert error(*command).startswith(refusal)


def test_a_digest_is_that_of_config_and_weights(tmp_path):
    """Of the section no field: a run names those that it uses."""
    demo = checkpoint_folder("demo")
    first, other = (copy_checkpoint(demo, tmp_path / name, budget=budget) for name, budget in (("a", 16), ("b", 8)))
    assert checkpoint_digest(first) == checkpoint_digest(other) != checkpoint_digest(demo.with_name("demo-global"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -3}))
    assert checkpoint_digest(first) != checkpoint_digest(other)
    weights = load_file(first / "model.safetensors")
    before = checkpoint_digest(first)
    weights["language_model.lm_head.weight"][0, 0] += 1
    save_file(weights, first / "model.safetensors")
    assert checkpoint_digest(first) != before
    (first / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors files, or not all of them"):
        checkpoint_digest(first)
