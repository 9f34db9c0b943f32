"""Engines of vLLM and their reference: the same checkpoint in transformers, greedy, float32."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NEW_TOKENS = 5
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# How the keys of a checkpoint may be written: as transformers 5 saves them (and the demo's are), as 4.57 does, and by
# the names of the modules.
LAYOUTS = {
    "5x": {},
    "4x": {r"^vision_tower\.(?!vision_model\.)": "vision_tower.vision_model."},
    "modules": {
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head\.": "lm_head.",
        r"^(vision_tower|multi_modal_projector|image_newline)": r"model.\1",
    },
}


def copy_checkpoint(source: Path, target: Path, layout: str = "5x", **fields: Any) -> Path:
    """A copy of a checkpoint with some fields of its section changed and its keys in another layout."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((target / "config.json").read_text())
    config["token_recovery"] |= fields
    (target / "config.json").write_text(json.dumps(config))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    if config["token_recovery"]["text_encoder_config"] is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("token_recovery.")}
        drop_recovery_tokenizer(target)
    save_file({renamed(name, layout): value for name, value in weights.items()}, target / "model.safetensors")
    return target


def drop_recovery_tokenizer(folder: Path) -> None:
    """Make a checkpoint's processor that of a visual-only model."""
    shutil.rmtree(folder / "recovery_tokenizer")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings.pop("recovery_max_length")
    (folder / "processor_config.json").write_text(json.dumps(settings))


def renamed(name: str, layout: str) -> str:
    """A key in another layout."""
    for pattern, replacement in LAYOUTS[layout].items():
        name = re.sub(pattern, replacement, name)
    return name


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine in this process, or in one of its own where the environment says so."""
    from vllm import LLM

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 64, **options}
    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompt(text: str, images: Sequence[Any] | Any = (), **arguments: Any) -> dict[str, Any]:
    """A request with its pictures (or `image_embeds` as tensors) and processing arguments."""
    request: dict[str, Any] = {"prompt": text}
    if images:
        request["multi_modal_data"] = {"image": images}
    if arguments:
        request["mm_processor_kwargs"] = arguments
    return request


def ask(llm: Any, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Greedy ids of every request, asked together."""
    return [list(output.outputs[0].token_ids) for output in run(llm, requests)]


def run(llm: Any, requests: Sequence[dict[str, Any]], **sampling: Any) -> list[Any]:
    """The engine's output for every request."""
    from vllm import SamplingParams

    settings = SamplingParams(**{"temperature": 0, "max_tokens": NEW_TOKENS, **sampling})
    return llm.generate(list(requests), settings, use_tqdm=False)


def reference(model: Any, inputs: dict[str, Any], **fields: Any) -> list[int]:
    """Greedy ids of one prompt in transformers, as far as the engine would go."""
    options = {"token_recovery": fields} if fields else {}
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    eos = model.generation_config.eos_token_id
    return new[: new.index(eos) + 1] if eos in new else new


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forget(llm: Any) -> None:
    """Empty the caches of pictures and of prefixes."""
    llm.reset_mm_cache()
    assert llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()


@contextlib.contextmanager
def server(folder: Path, port: int, log: Path, *options: str) -> Iterator[str]:
    """The HTTP server, once it answers; its address."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, **ENVIRONMENT},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its engines too
            process.wait()
