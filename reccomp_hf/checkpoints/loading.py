"""Loading a compressed checkpoint by name, as the commands do: the whole model, or its image side alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from .hub import resolve
from .image_encoder import load_image_encoder
from .info import describe, folder_of
from .processors import load_processor
from .weight_files import WeightFiles

DTYPES = ("float32", "float16", "bfloat16")


def load(
    name: str,
    fields: dict[str, Any],
    device: str | None = None,
    dtype: str | None = None,
    *,
    cuda_graph: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a compressed checkpoint for inference.

    Args:
        name: `demo` or `demo-global` (shipped with this package), a folder, or a Hub id.
        fields: Fields of its `token_recovery` section to override.
        device: A torch device; by default a GPU if there is one.
        dtype: Dtype of the weights; by default float32 on a CPU, and the checkpoint's own elsewhere.
        cuda_graph: Whether prefills are replayed as CUDA graphs, see the model's `use_cuda_graph`.
        **options: Further arguments of `from_pretrained`; with a `device_map` the model stays where that puts it.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        ValueError: The checkpoint is not a compressed LLaVA, the fields do not fit it, or the device does not exist.
        OSError: There is no such checkpoint.
    """
    return _load(AutoModelForImageTextToText.from_pretrained, name, fields, device, dtype, cuda_graph, options)


def load_encoder(
    name: str,
    fields: dict[str, Any],
    device: str | None = None,
    dtype: str | None = None,
    *,
    cuda_graph: bool = False,
) -> tuple[Any, Any]:
    """As [`load`], without the layers of the language model, see `load_image_encoder`."""
    return _load(load_image_encoder, name, fields, device, dtype, cuda_graph, {})


def _load(
    from_pretrained: Callable[..., Any],
    name: str,
    fields: dict[str, Any],
    device: str | None,
    dtype: str | None,
    cuda_graph: bool,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    folder = folder_with_weights(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
    processor = load_processor(folder)
    model = from_pretrained(folder, trust_remote_code=False, dtype=dtype, token_recovery=fields, **options)
    model = model if "device_map" in options else model.to(device)
    model.use_cuda_graph(cuda_graph)
    processor.recovery_rules = model.config.token_recovery.rules
    return model.eval(), processor


def folder_with_weights(name: str) -> Path:
    """The folder of a checkpoint, which is described first: that finds errors before weights are downloaded."""
    folder = folder_of(name)
    describe(folder, name)
    return folder if WeightFiles.find(folder).complete else resolve(name)


def _check_device(device: str) -> None:
    """Refuse a device that torch cannot use, before anything is loaded.

    Raises:
        ValueError: It cannot.
    """
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"Device {device!r} cannot be used here ({reason}). Use --device cpu.") from error


__all__ = ["DTYPES", "folder_with_weights", "load", "load_encoder", "load_image_encoder"]
