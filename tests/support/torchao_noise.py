"""What TorchAO writes to stderr where transformers imports it, which it does wherever it is installed."""

from __future__ import annotations


def without_torchao(text: str) -> str:
    """The text without the lines that say which kernels TorchAO could not load and which enums it registered."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if "torchao" not in line and "torch/utils/_pytree.py" not in line)
