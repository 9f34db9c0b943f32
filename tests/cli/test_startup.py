"""The first moments of `reccomp-hf`: help and errors come without torch, Ctrl-C leaves one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reccomp_hf
from reccomp_hf.cli import COMMANDS

REFUSED = "raise SystemExit(f'{__name__} was imported')\n"
ENDLESS = """
import os, time
open(os.environ["STARTED"], "w").close()
while True:
    time.sleep(0.01)
"""
MODULE = ("-m", "reccomp_hf")


def environment(folder, source):
    """Variables of a child whose torch and transformers are modules of that source."""
    for name in ("torch", "transformers"):
        (folder / f"{name}.py").write_text(source)
    package = str(Path(reccomp_hf.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), package]), "STARTED": str(folder / "started")}


@pytest.fixture
def start(tmp_path):
    """Run Python where torch and transformers cannot be imported; returns exit code, stdout and stderr."""

    def call(*arguments):
        child = environment(tmp_path, REFUSED)
        done = subprocess.run(
            [sys.executable, *arguments], env=child, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_version_and_help_come_without_torch(start):
    assert start(*MODULE, "--version") == (0, f"reccomp-hf {reccomp_hf.__version__}\n", "")
    code, out, err = start(*MODULE, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: reccomp-hf ")
    code, out, err = start(*MODULE)
    assert (code, err) == (2, "") and out.startswith("usage: reccomp-hf ")


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_help_of_a_command_comes_without_torch(start, module):
    name = module.__name__.rpartition(".")[2]
    code, out, err = start(*MODULE, name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: reccomp-hf {name} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demmo"], "; did you mean 'demo'? (see reccomp-hf --help)"),
        (["demo", "--bugdet", "4"], "unrecognized arguments: --bugdet 4; did you mean '--budget'? (see"),
        (["demo", "--xyz", "4"], "unrecognized arguments: --xyz 4 (see reccomp-hf demo --help)"),
        (["convert", "a", "b", "--preset", "ballanced"], "; did you mean 'balanced'? (see"),
        (["convert", "a", "b", "--set", "bugdet=4"], "unknown token_recovery field 'bugdet'; did you mean 'budget'?"),
        (["convert", "a", "b", "--set", "xyz=4"], "unknown token_recovery field 'xyz'; known fields are version, "),
        (["demo", "--budget", "few"], "a share of them or 'dynamic', got 'few'"),
        (["demo", "--output", "picture.txt"], "expected a file that ends in .png"),
        (["convert", "a", "b", "--preset", "best"], "invalid choice: 'best'"),
        (["convert", "a", "b", "--set", "budget"], "expected field=value, got 'budget'"),
        (["eval", "demo", "--limit", "0"], "expected a whole number of at least 1, got '0'"),
        (["cost", "--hardware", "abacus"], "unknown hardware 'abacus'; known are A100"),
        (["cost", "--config", "llava-2"], "invalid choice: 'llava-2'"),
        (["bench"], "one of the arguments MODEL --config --report is required"),
        (["predict", "data.jsonl"], "the following arguments are required: --model, --output"),
    ],
)
def test_a_typo_is_answered_without_torch(start, arguments, message):
    code, out, err = start(*MODULE, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("reccomp-hf: error: ") and err.count("\n") == 1 and message in err


def test_the_console_script_is_known_by_its_name(start, tmp_path):
    script = "import sys\nfrom reccomp_hf.cli.main import main\nsys.exit(main())\n"
    for name in ("reccomp-hf", "another-program"):
        (tmp_path / name).write_text(script)
    assert start(tmp_path / "reccomp-hf", "--version") == (0, f"reccomp-hf {reccomp_hf.__version__}\n", "")
    code, out, err = start(tmp_path / "another-program", "--version")
    assert (code, out) == (1, "") and "was imported" in err


def test_a_command_imports_what_it_needs(start):
    code, out, err = start(*MODULE, "info", ".")
    assert (code, out) == (1, "") and "was imported" in err


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent as POSIX does")
def test_an_interrupt_during_imports_is_one_line(tmp_path):
    child = subprocess.Popen(
        [sys.executable, *MODULE, "info", "."],
        env=environment(tmp_path, ENDLESS),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell may have ignored it
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert (child.returncode, out, err) == (130, "", "reccomp-hf: interrupted\n")
