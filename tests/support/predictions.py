"""Data for `predict`, running it on the demo model in the test's own process or others, and killing it."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_model import demo_model

from reccomp_hf.data import parts
from reccomp_hf.engines.predict import predict
from reccomp_hf.measure.evaluation import demo_samples

COUNT = 11
NEW_TOKENS = 3


def save_pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    """Questions on the demo's scenes as rows, two or so of each, their pictures written to a folder."""
    rows = []
    for number, sample in enumerate(demo_samples(3 * count)[::3]):
        path = folder / f"{sample.picture}.png"
        if not path.exists():
            sample.open().save(path)
        rows.append({"id": f"q{number}", "image": path.name, "question": sample.question})
    return rows


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A file of JSON lines; strings are written unchanged."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an output."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask(data: Path, output: Path, **options: Any) -> Any:
    """`predict` with the demo model, shared by all tests."""
    return predict(*demo_model(), data, output, **{"max_new_tokens": NEW_TOKENS, "batch_size": 4, **options})


def answers(data: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    """The lines that `ask` wrote."""
    ask(data, output, **options)
    return read_lines(output)


def left(output):
    """Whether the folder of a run is still there."""
    return output.with_name("out.jsonl.parts").exists()


def left_files(output):
    """The files that its processes wrote."""
    return sorted(output.with_name("out.jsonl.parts").glob("part-*.jsonl"))


LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]


def launched(processes, *arguments):
    """The command in processes of its own, several by accelerate; `--multi_gpu` is what starts them on CPUs too."""
    start = [sys.executable]
    if processes > 1:
        start += [*LAUNCH, "--dynamo_backend", "no", "--num_processes", str(processes), "--main_process_port", "0"]
    command = [*start, "-m", "reccomp_hf", "predict", *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return command, environment


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Deadly:
    """Kills a run at some step of its work on files, in the middle of a write."""

    def __init__(self, monkeypatch, steps):
        self.steps = steps
        for name in ("mkdir", "unlink", "replace"):
            monkeypatch.setattr(Path, name, self._around(getattr(Path, name)))
        monkeypatch.setattr(parts.shutil, "rmtree", self._around(shutil.rmtree))
        opened = Path.open

        def open_path(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            if mode == "x":
                file.write = self._half(file, file.write)
                file.writelines = lambda lines: file.write("".join(lines))
            return file

        monkeypatch.setattr(Path, "open", open_path)

    def step(self):
        self.steps -= 1
        return self.steps < 0

    def _around(self, function):
        def call(*args, **kwargs):
            if self.step():
                raise Killed
            value = function(*args, **kwargs)
            if self.step():
                raise Killed
            return value

        return call

    def _half(self, file, write):
        def call(text):
            if self.step():
                write(text[: len(text) // 2])
                file.flush()
                raise Killed
            return write(text)

        return call


def killed(data, output, steps, **options):
    """Whether a run was killed before it was over."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Deadly(monkeypatch, steps)
        try:
            ask(data, output, **options)
        except Killed:
            return True
    return False


class Waiting(Exception):
    """Where a process waits for the others."""


class State:
    """Accelerate's state of one of several processes, which does not wait."""

    def __init__(self, index, count):
        self.process_index, self.num_processes, self.is_main_process = index, count, index == 0

    def wait_for_everyone(self):
        raise Waiting

    def main_process_first(self):
        return contextlib.nullcontext()
