"""Converting needs the memory of about one of LLaVA's files."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from architectures import LLAVA
from conversions import SMALL, weights_of
from paths import SUPPORT
from transformers import LlamaConfig

import reccomp_hf
from reccomp_hf import convert


class Peak(threading.Thread):
    """The most memory of its own that this process has while the thread runs; mapped files are not counted."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes, self.peak, self.done = self.own(), 0, threading.Event()

    @staticmethod
    def own():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self):
        while not self.done.is_set():
            self.peak = max(self.peak, self.own())
            time.sleep(0.0005)


@contextlib.contextmanager
def measured(name, results):
    thread = Peak()
    thread.start()
    yield
    thread.done.set()
    thread.join()
    results[name] = max(thread.peak, Peak.own()) - thread.start_bytes


def measure(folder):
    """In a process of its own: convert, convert with a cast, and read all weights at once, to see that it is seen."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    folder, results = Path(folder), {}
    convert(*LLAVA.save_sources(folder / "small"), folder / "warm", dtype="bfloat16")  # imports are not the question
    with measured("copy", results):
        convert(folder / "stock", folder / "clip", folder / "copied")
    with measured("cast", results):
        convert(folder / "stock", folder / "clip", folder / "cast", dtype="bfloat16")
    with measured("whole", results):
        held = [value.clone() for value in weights_of(folder / "stock").values()]
    del held
    sys.stdout.write(json.dumps(results))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_near_one_file(tmp_path):
    """LLaVA-7B's 32 layers and many files, narrow."""
    text = {**SMALL, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 32, "num_key_value_heads": 4}
    stock = tiny.stock_llava(text_config=LlamaConfig(**text, tie_word_embeddings=False))
    stock.save_pretrained(tmp_path / "stock", max_shard_size="2.5MB")
    tiny.stock_processor().save_pretrained(tmp_path / "stock")
    tiny.clip_model(seed=1, vision_from=stock).save_pretrained(tmp_path / "clip")
    tiny.clip_tokenizer().save_pretrained(tmp_path / "clip")
    sizes = [path.stat().st_size for path in (tmp_path / "stock").glob("*.safetensors")]
    assert len(sizes) > 20
    del stock
    here = [str(Path(__file__).parent), str(SUPPORT), str(Path(reccomp_hf.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", f"import test_convert_memory as t; t.measure({str(tmp_path)!r})"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    growth, total = json.loads(done.stdout), sum(sizes)
    figures = f"{growth}, {total} bytes in {len(sizes)} files of at most {max(sizes)}"
    assert growth["whole"] > 0.9 * total, figures
    assert growth["copy"] < 5 * max(sizes) < 0.25 * total, figures
    assert growth["cast"] < 5 * max(sizes), figures
    assert len(list((tmp_path / "copied").glob("*.safetensors"))) == len(sizes) + 1
