"""The notebooks are whole, tidy and up to date; `python tests/support/run_notebooks.py` writes their outputs."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
import transformers
from paths import NOTEBOOKS
from run_notebooks import execute, paths, printed, read

MOST_BYTES = 800_000
MACHINES = re.compile(
    "|".join(
        [
            r"/(?:home|root|usr|opt|tmp|var|mnt|work|workspace|Users)/",
            r"\b[A-Z]:\\",
            "site-packages",
            r"https?://(?!huggingface\.co/|arxiv\.org/)",
            *map(re.escape, {str(Path.home()), tempfile.gettempdir(), str(NOTEBOOKS.parent)}),
        ]
    )
)
"""Patterns of texts that belong to the machine a notebook ran on."""

each_notebook = pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {path.name[:3] for path in paths()} >= {"01_", "02_", "03_"}


@each_notebook
def test_a_notebook_is_whole(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert notebook.cells[0].source.startswith("# ")
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert path.stat().st_size < MOST_BYTES
    said = {(output.output_type, output.get("name")) for cell in code for output in cell.outputs}
    assert said <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}  # no errors, no warnings


@each_notebook
def test_a_notebook_knows_no_machine(path):
    notebook = read(path)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts += [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text")]
        for text in texts:
            assert MACHINES.search(text) is None, text


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__.startswith("4"), reason="they show files as transformers 5 writes them")
@each_notebook
def test_a_notebook_still_prints_what_it_shows(path):
    stored, executed = read(path), execute(path)
    for before, after in zip(stored.cells, executed.cells, strict=True):
        if before.cell_type == "code":
            assert printed(after) == printed(before), f"in a cell of {path.name}:\n{before.source}"
