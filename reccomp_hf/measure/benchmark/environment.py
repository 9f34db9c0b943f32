"""The machine and the versions that a measurement was taken with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from ...core import __version__


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device, dtype and threads, as JSON values."""
    return {
        "reccomp_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def describe_environment(facts: Mapping[str, Any]) -> str:
    """Device, dtype, threads and versions of a benchmark's results in one line."""
    found = facts["environment"]
    threads = "" if found["cuda"] else f", {found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return (
        f"{found['device']} ({found['device_name']}), {found['dtype']}{threads}; "
        f"torch {found['torch']}, transformers {found['transformers']}"
    )


__all__ = ["describe_environment", "environment"]
