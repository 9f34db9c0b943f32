"""Fixtures for tests of the command line: running a command, and checkpoints to run it on."""

import pytest
import tiny

from reccomp_hf.cli import main as cli


@pytest.fixture
def run(capsys):
    """Run a command; returns exit code, stdout and stderr."""

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leave:  # argparse leaves by itself
            code = leave.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def error(run):
    """Run a command that must fail with one line; returns what follows `reccomp-hf: error: `."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("reccomp-hf: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err.removeprefix("reccomp-hf: error: ").strip()

    return call


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    tiny.save_stock(folder / "llava")
    tiny.save_clip(folder / "clip")
    return folder / "llava", folder / "clip"


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "model"
    settings = ["--set", "budget=24", "--set", "text_relevance=value"]
    assert cli.main(["convert", *map(str, sources), str(output), *settings]) == 0
    return output
