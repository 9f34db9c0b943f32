"""Every Python block of the README and the guides runs alone, in an empty folder, and prints what stands below it."""

import re
import warnings

import pytest
from chat_client import running
from demo_model import demo_model
from paths import GUIDES, ROOT

from reccomp_hf.core.methods import registry
from reccomp_hf.engines.server.answering import Service

BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
BLOCKS = {
    f"{path} {number}": found
    for path in GUIDES
    for number, found in enumerate(BLOCK.findall((ROOT / path).read_text(encoding="utf-8")), start=1)
}
SERVER = "127.0.0.1:8000"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run code in an empty folder, as a script of its own; returns the lines that it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def call(code):
        with warnings.catch_warnings():
            # PEFT and TRL read what transformers 5.23 renamed; a reader may have a GPU, for which memory is pinned.
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no acc", UserWarning)
            names = {"__name__": "__main__"}
            exec(compile(code, "<block>", "exec"), names)
        return capsys.readouterr().out.strip().splitlines(), names

    return call


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_prints_what_stands_below_it(run, name):
    code, expected = BLOCKS[name]
    assert expected.strip(), "a block must print what its reader wants to see"
    if SERVER in code:
        pytest.importorskip("openai")
        with running(Service("demo", *demo_model())) as server:
            lines, names = run(code.replace(SERVER, f"127.0.0.1:{server.port}"))
            names["client"].close()
    else:
        lines, _ = run(code)
    expected = expected.strip().splitlines()
    assert lines[-len(expected) :] == expected


def test_every_guide_with_python_names_what_it_needs():
    for path in {name.rpartition(" ")[0] for name in BLOCKS} - {"README.md"}:
        head = (ROOT / path).read_text(encoding="utf-8").split("\n")[:4]
        assert any(line.startswith("Needs: `pip install ") for line in head), path
    assert len(BLOCKS) >= 10
