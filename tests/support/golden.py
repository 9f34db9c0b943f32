"""Outputs of the paper's released code, written once (tests/data/golden)."""

from __future__ import annotations

from pathlib import Path

from paths import DATA
from safetensors import safe_open
from torch import Tensor

GOLDEN = sorted((DATA / "golden").glob("authors_*.safetensors"))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors in float32, and how many tokens each stage gave."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, {name: int(count) for name, count in file.metadata().items()}
