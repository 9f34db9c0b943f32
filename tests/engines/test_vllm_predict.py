"""`predict` by vLLM: the lines of the transformers engine, runs that are killed and resume, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import vllm_engines
from predictions import (
    COUNT,
    NEW_TOKENS,
    Deadly,
    Killed,
    ask,
    left,
    left_files,
    read_lines,
    save_pictures,
    write_lines,
)
from vllm_engines import engine
from vllm_scenes import environment  # noqa: F401

from reccomp_hf.demo import checkpoint_folder
from reccomp_hf.engines.vllm.prediction import predict_with_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions, rows of several images, and rows that cannot be asked, each for another reason."""
    folder = tmp_path_factory.mktemp("data")
    rows = save_pictures(folder, COUNT)
    images = sorted({row["image"] for row in rows})
    rows[3]["question"], rows[7]["image"] = "", "missing.png"
    rows += [
        {"id": "two", "image": images[:2], "question": "How many objects are there?"},
        {"id": "positions", "image": images[:4], "question": "What color is the ring?"},
        {"id": "long", "image": images[0], "question": "red " * 520},
        {"id": "q0", "image": images[0], "question": "repeated id"},
        "{",
    ]
    return write_lines(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def wanted(data, tmp_path_factory):
    """What the transformers engine writes."""
    output = tmp_path_factory.mktemp("wanted") / "out.jsonl"
    ask(data, output)
    lines = read_lines(output)
    errors = [line["id"] for line in lines if "error" in line]
    assert errors == ["q3", "q7", "positions", "long", "q0", None]
    assert len({line.get("answer") for line in lines}) > 4
    return output.read_bytes()


@pytest.fixture(scope="module")
def llm():
    with engine(checkpoint_folder("demo"), max_num_seqs=2) as llm:
        yield llm


def run(llm, data, output, **options):
    return predict_with_vllm(llm, data, output, **{"max_new_tokens": NEW_TOKENS, **options})


def test_lines_are_those_of_the_transformers_engine(llm, data, wanted, tmp_path):
    done = run(llm, data, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == wanted
    assert (done.rows, done.errors, done.new) == (COUNT + 5, 6, COUNT + 5)
    assert not left(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "options", [{"instruction": "Answer with one word."}, {"limit": 4}, {"max_new_tokens": 1}], ids=str
)
def test_options_are_those_of_the_transformers_engine(llm, data, tmp_path, options):
    ask(data, tmp_path / "theirs.jsonl", **options)
    run(llm, data, tmp_path / "ours.jsonl", **options)
    assert (tmp_path / "ours.jsonl").read_bytes() == (tmp_path / "theirs.jsonl").read_bytes()


def killed(llm, data, output, steps):
    """Whether a run was killed before it was over."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Deadly(monkeypatch, steps)
        try:
            run(llm, data, output)
        except Killed:
            return True
    return False


def test_a_run_that_is_killed_resumes(llm, data, wanted, tmp_path):
    new = []
    for steps in (4, 9, 16):
        output = tmp_path / f"{steps}" / "out.jsonl"
        output.parent.mkdir()
        assert killed(llm, data, output, steps)
        assert not llm.llm_engine.has_unfinished_requests()
        assert not output.exists()
        new.append(run(llm, data, output).new)
        assert output.read_bytes() == wanted
    assert COUNT + 5 >= new[0] > new[1] > new[2] > 0


def test_a_run_does_not_resume_by_another_engine_or_with_other_settings(llm, data, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    assert killed(llm, data, output, 9)
    with pytest.raises(ValueError, match=r"which differs in engine \('vllm' there, None here\), and in max_model_len"):
        ask(data, output)
    with pytest.raises(ValueError, match=r"which differs in max_new_tokens \(3 there, 2 here\)"):
        run(llm, data, output, max_new_tokens=2)
    run(llm, data, output)
    with pytest.raises(FileExistsError, match="is finished and was left unchanged"):
        run(llm, data, output)
    assert output.read_bytes() == wanted


def test_answers_end_at_the_longest_sequence(data, tmp_path):
    """A row that does not fit says so; another's answer stops there."""
    with engine(checkpoint_folder("demo"), max_num_seqs=2, max_model_len=40) as llm:
        run(llm, data, tmp_path / "out.jsonl")
    errors = {line["id"]: line["error"] for line in read_lines(tmp_path / "out.jsonl") if "error" in line}
    assert "of the model's 40 positions" in errors["two"]
    assert "of the model's 512 positions" in errors["long"]


def test_the_command_survives_a_kill(data, wanted, tmp_path):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    command = [sys.executable, "-m", "reccomp_hf", "predict", str(data), "--model", "demo", "--engine", "vllm"]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", "1", "--output", str(output), "--json"]
    options = {"env": {**os.environ, **vllm_engines.ENVIRONMENT}, "stdin": subprocess.DEVNULL}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, **options)
        while process.poll() is None and not sum(path.read_bytes().count(b"\n") for path in left_files(output)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert left(output), log.read_text()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == wanted
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["errors"]) == (COUNT + 5, 6)
    assert 0 < summary["new"] < summary["rows"]
