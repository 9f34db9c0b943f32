"""Where a measurement was taken."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from ... import __version__


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


__all__ = ["environment"]
