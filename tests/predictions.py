"""Data for `predict`, and running it on the demo model in the test's own process."""

import json
from pathlib import Path
from typing import Any

from demo_model import demo_model

from reccomp_hf.evaluation import demo_samples
from reccomp_hf.prediction import predict

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
    """A file of JSON lines; what is a string is written as it is."""
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
    """What `ask` wrote."""
    ask(data, output, **options)
    return read_lines(output)
