"""Throughput in vLLM: clients, turns and ratios with an engine that is none, and the command with two real ones."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
import vllm_engines

from reccomp_hf.checkpoints.processors import load_config, load_processor
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.counting import fixed_tokens, patches_per_side
from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.vllm import starting, throughput
from reccomp_hf.engines.vllm.checks import check_servable
from reccomp_hf.engines.vllm.random_weights import write_without_weights
from reccomp_hf.engines.vllm.throughput import CACHE, SPEED, WAIT, ask_all, compare_throughput, throughput_text
from reccomp_hf.measure.benchmark import named_config

pytest_plugins = ("command_line",)

# ---- clients -------------------------------------------------------------------------------------------------------


class Clock:
    """A clock, and answers that take the time they name: seconds to the first token, and to each further one."""

    def __init__(self):
        self.now, self.asked, self.answering, self.most = 0.0, [], 0, 0

    async def answer(self, request):
        first, others = request
        self.asked.append(request)
        self.answering += 1
        self.most = max(self.most, self.answering)
        for step in range(1 + others):
            await asyncio.sleep(0)
            self.now += 1.0 if step else first
            yield step
        self.answering -= 1


def test_a_client_waits_for_its_answer():
    clock, requests = Clock(), [(3.0, 2), (5.0, 0), (9.0, 3)]
    measures = asyncio.run(ask_all(clock.answer, requests, 1, lambda: clock.now))
    assert measures == {SPEED: 3 / (3 + 2 + 5 + 9 + 3), WAIT: 5.0}
    assert (clock.asked, clock.most) == (requests, 1)


@pytest.mark.parametrize("clients", [2, 3, 9])
def test_every_request_is_asked_once_by_as_many_clients(clients):
    clock, requests = Clock(), [(float(number), number % 3) for number in range(1, 8)]
    asyncio.run(ask_all(clock.answer, requests, clients, lambda: clock.now))
    assert clock.asked == requests
    assert clock.most == min(clients, len(requests))


# ---- turns and ratios ----------------------------------------------------------------------------------------------


class FakeEngine:
    """Takes down what it is asked; its measures are the number of its turn."""

    log: list = []

    def __init__(self, options, loop):
        self.options, self.turns = options, 0
        self.enabled = (
            options["hf_overrides"]["token_recovery"].get("enabled", True) if options["hf_overrides"] else True
        )
        self.section = TokenRecoveryConfig(budget=options["hf_overrides"].get("token_recovery", {}).get("budget", 99))

    def ask(self, requests, clients, new_tokens):
        self.log.append((self.enabled, requests, clients, new_tokens))
        turn = self.turns
        self.turns += 1
        factor = 1 if self.enabled else 4
        return {SPEED: (1.0 + turn) / factor, WAIT: (2.0 + turn) * factor, CACHE: 128.0 * factor}

    def facts(self):
        environment = {"device": "cpu", "device_name": "none", "dtype": "float32", "cuda": None, "threads": 1}
        return {**environment, "torch": "2", "transformers": "5", "vllm": "0"}

    def close(self):
        self.log.append("closed")


@pytest.fixture
def fake(monkeypatch):
    def options(folder, token_recovery, dtype):
        return {"model": folder, "hf_overrides": {"token_recovery": token_recovery} if token_recovery else {}}

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(FakeEngine, "log", [])
    monkeypatch.setattr(throughput, "_Engine", FakeEngine)
    monkeypatch.setattr(throughput, "engine_options", options)
    return FakeEngine


def test_both_engines_answer_the_same_new_requests_in_turns(fake, tmp_path):
    facts = compare_throughput(tmp_path, 16, clients=(1, 3), new_tokens=(2, 5), rounds=3, picture=(5, 4))
    assert fake.log[-2:] == ["closed"] * 2
    turns, seen = fake.log[:-2], set()
    assert [row["clients"] for row in facts["rows"]] == [1, 3, 1, 3]
    assert [row["new_tokens"] for row in facts["rows"]] == [2, 2, 5, 5]
    for number in range(4):
        row = turns[8 * number : 8 * (number + 1)]
        clients, new_tokens = (1, 3)[number % 2], (2, 5)[number // 2]
        assert [(len(asked), count) for _, asked, count, _ in row] == [(1, 1)] * 2 + [(2 * clients, clients)] * 6
        assert {tokens for *_, tokens in row} == {new_tokens}
        assert [enabled for enabled, *_ in row] == [False, True, False, True, True, False, False, True]
        for first, second in zip(row[::2], row[1::2], strict=True):
            assert first[1] is second[1]
            pictures = [request["multi_modal_data"]["image"] for request in first[1]]
            assert {picture.size for picture in pictures} == {(5, 4)}
            names = {picture.tobytes() for picture in pictures}
            assert len(names) == len(pictures) and not names & seen
            seen |= names


def test_ratios_are_of_one_round_and_in_favour_of_ours(fake, tmp_path):
    facts = compare_throughput(tmp_path, clients=(2,), new_tokens=(4,), rounds=3, picture=(5, 4))
    (row,) = facts["rows"]
    assert facts["settings"]["token_recovery"]["budget"] == 99
    assert row["engines"]["ours"][SPEED]["values"] == [2.0, 3.0, 4.0]  # the first turn warmed up
    assert row["engines"]["stock"][SPEED]["values"] == [0.5, 0.75, 1.0]
    assert row["engines"]["stock"][WAIT]["median"] == 16.0
    assert [row["ratios"][name]["values"] for name in (SPEED, WAIT, CACHE)] == [[4.0, 4.0, 4.0]] * 3
    table = throughput_text("some model", facts).splitlines()
    assert table[0] == "some model in vLLM 0 on cpu (none), float32, 1 thread; torch 2, transformers 5"
    wanted = "2 4 0.75 / 3.00 4.00x [4.00, 4.00] 16.00 / 4.00 4.00x [4.00, 4.00] 512 / 128 4.00x [4.00, 4.00]"
    assert " ".join(table[-1].split()) == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new_tokens": (1, 8)}, "new tokens must be at least 2 with --engine vllm, got 1"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"clients": (4, 0)}, "clients 0 must be at least 1, got 0"),
    ],
)
def test_numbers_that_are_too_small_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        compare_throughput(tmp_path, 16, **fields)


# ---- a checkpoint without weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mid", "llava-1.5-7b"])
def test_a_checkpoint_without_weights_is_as_its_config_says(tmp_path, name):
    config = named_config(name, "balanced")
    write_without_weights(config, tmp_path)
    assert not [*tmp_path.glob("*.safetensors*")]
    found, processor = load_config(tmp_path), load_processor(tmp_path)
    for part in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(found.text_config, part) == getattr(config.text_config, part)
    assert patches_per_side(found) == 24
    check_servable(found)
    assert fixed_tokens(found, found.token_recovery) == 64
    text = "USER: <image>\nWhat letter is on the cyan sign? ASSISTANT:"
    inputs = processor(images=[draw_scene(1_000_000).image], text=[text], return_tensors="pt")
    assert tuple(inputs["pixel_values"].shape) == (1, 3, 336, 336)
    assert int((inputs["input_ids"] == found.image_token_id).sum()) == 576
    encoder = found.token_recovery.text_encoder_config
    assert inputs["recovery_input_ids"].flatten().tolist().count(encoder["eos_token_id"]) >= 1


def test_a_configuration_of_tiles_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a LLaVA-1\.5, got a LLaVA-NeXT: name a checkpoint"):
        write_without_weights(named_config("llava-v1.6-vicuna-7b", "balanced"), tmp_path)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "mid", "--plot", "a.png"], "--plot is an option of the engine transformers. With --engine vllm"),
        (["--config", "mid", "--device", "cpu"], "--device is an option of the engine transformers"),
        (["--config", "mid", "--budgets", "dynamic"], "compares one fixed budget with the stock model: name it"),
        (["--config", "mid", "--budgets", "64,128"], "compares one fixed budget with the stock model"),
        (["demo", "--preset", "paper"], "--preset goes with --config"),
        (["demo", "--new-tokens", "1"], "new tokens must be at least 2"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(error, arguments, message):
    assert message in error("bench", *arguments, "--engine", "vllm")


def test_without_vllm_the_error_says_how_to_install_it(error, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(starting, "find_spec", lambda name: None)
    assert error("bench", "demo", "--engine", "vllm").startswith("vLLM is not installed: pip install")


def test_several_numbers_of_new_tokens_need_vllm(error):
    assert "Several --new-tokens go with --engine vllm" in error("bench", "demo", "--new-tokens", "8,64")


@pytest.mark.vllm
def test_the_command_compares_two_engines(tmp_path):
    """Each in processes of its own. No time is judged."""
    output = tmp_path / "bench.json"
    command = [sys.executable, "-m", "reccomp_hf", "bench", "demo", "--engine", "vllm", "--image-size", "96x96"]
    command += ["--batch-sizes", "1,3", "--new-tokens", "4", "--repeats", "2", "--json", str(output)]
    environment = {**os.environ, **vllm_engines.ENVIRONMENT}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    facts = json.loads(output.read_text())
    assert done.stdout.startswith(f"demo in vLLM {facts['environment']['vllm']} on cpu (")
    assert facts["settings"]["token_recovery"]["budget"] == 16
    for row, clients in zip(facts["rows"], (1, 3), strict=True):
        engines = row["engines"]
        assert row["clients"] == clients
        # 144 visual tokens and a text of 70 take two blocks of 128 tokens of the cache, 16 and 70 take one
        for name, tokens in (("stock", 256), ("ours", 128)):
            used = engines[name][CACHE]["values"]  # less where a client asks after another's answer
            assert used == [tokens] * 2 if clients == 1 else set(used) <= {tokens, 2 * tokens, 3 * tokens}
        for measures in engines.values():
            assert min(measures[WAIT]["values"]) > 0
            # no client can be faster than its own answers
            assert max(measures[SPEED]["values"]) < clients / min(measures[WAIT]["values"]) * 3
