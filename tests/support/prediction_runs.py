"""Fixtures for tests of runs of `predict`: data, and the output of one undisturbed run."""

import pytest
from predictions import COUNT, ask, save_pictures, write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions, and two rows that are none."""
    folder = tmp_path_factory.mktemp("data")
    rows = save_pictures(folder, COUNT)
    rows[3]["question"], rows[7]["image"] = "", "missing.png"
    return write_lines(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def wanted(data, tmp_path_factory):
    """The output of one undisturbed run."""
    output = tmp_path_factory.mktemp("wanted") / "out.jsonl"
    ask(data, output)
    return output.read_bytes()
