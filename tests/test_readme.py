"""What the README shows runs, and its table can be made again."""

import re
from pathlib import Path

import pytest
import torch
from test_next_layout import NEWLINE, packed_oracle
from transformers import AutoModelForImageTextToText, AutoProcessor

import reccomp_hf
from reccomp_hf.demo import checkpoint_folder, measure

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_snippets_run(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert capsys.readouterr().out.split("\n")[:2] == ["five", "tensor([16])"]
    exec(blocks[1].replace("llava-1.5-7b-reccomp", "llava-reccomp"), names)


def test_the_first_forty_lines_hold_what_a_newcomer_needs():
    top = "\n".join(README.read_text(encoding="utf-8").splitlines()[:42])
    for needed in (
        "pip install . && reccomp-hf demo",
        'pip install -e ".[test]" && pytest',
        "from_pretrained",
        "| checkpoint |",
    ):
        assert needed in top


def test_the_table_is_measured_as_it_says(tmp_path):
    folder = reccomp_hf.convert(checkpoint_folder("llava"), checkpoint_folder("clip"), tmp_path / "demo")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    settings = measure.settings((16,))
    named = ("uncompressed", "balanced, 16", "paper's stages, visual only, 16", "3x3 pooling")
    result = measure.measure(
        model, AutoProcessor.from_pretrained(folder), 40, {name: settings[name] for name in named}
    )
    assert [result[name]["tokens"] for name in named] == [144, 16, 16, 16]
    means = [result[name]["mean"] for name in named]
    assert means[0] > 0.9
    assert 0.7 < means[1] < means[0]
    assert means[2] < means[1] - 0.1
    assert means[3] < means[1]


def test_the_stock_counts_of_llava_next_are_true():
    row = r"^\| (\d+) x (\d+) \| 1 \+ (\d) \| ([\d,]+) \+ (\d+) = ([\d,]+) \|"
    rows = re.findall(row, README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        width, height, tiles, patches, newlines, total = (int(cell.replace(",", "")) for cell in row)
        order, _, count = packed_oracle((height, width))
        assert (len(order), count) == (total, tiles + 1)
        assert (sum(slot != NEWLINE for slot in order), order.count(NEWLINE)) == (patches, newlines)
