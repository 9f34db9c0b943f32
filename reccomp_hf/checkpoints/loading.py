"""Loading a compressed checkpoint by name: the whole model, or all of it but the language model's layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .hub import resolve
from .info import describe, folder_of
from .quiet import quiet

DTYPES = ("float32", "float16", "bfloat16")


def load(
    name: str,
    fields: dict[str, Any],
    device: str | None = None,
    dtype: str | None = None,
    encoder: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a compressed checkpoint for inference.

    Args:
        name: `demo` or `demo-global` (this package's own), a folder, or a Hub id.
        fields: What overrides its `token_recovery` section.
        device: For torch; by default a GPU if there is one.
        dtype: By default float32 on a CPU and the weights' own elsewhere.
        encoder: Leave the language model's layers out, see `load_image_encoder`.
        **options: For `from_pretrained`; with a `device_map` the model stays where that puts it.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        ValueError: It is no compressed LLaVA, or the fields do not fit it.
        OSError: There is no such checkpoint.
    """
    folder = folder_of(name)
    describe(folder, name)  # says what is wrong before weights are fetched
    folder = folder if any(folder.glob("model*.safetensors")) else resolve(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # before anything is loaded
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"Nothing can run on device {device!r} here ({reason}): --device cpu always can.") from error
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
    load_one = load_image_encoder if encoder else AutoModelForImageTextToText.from_pretrained
    model = load_one(folder, dtype=dtype, token_recovery=fields, **options)
    model = model if "device_map" in options else model.to(device)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def load_image_encoder(
    pretrained_model_name_or_path: str | os.PathLike[str],
    token_recovery: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a compressed LLaVA without the layers of its language model, which `embed_images` does not need.

    The language model's embedding table comes along: it says where a picture stands in a prompt.

    Args:
        pretrained_model_name_or_path: A checkpoint of ours: a folder or a Hub id.
        token_recovery: Fields of the config section to override.
        **kwargs: What `from_pretrained` takes besides, `dtype` for one.

    Returns:
        A model without head, in eval mode; its `forward` is of no use.

    Raises:
        ValueError: Fields that do not fit, or weights that are missing.
    """
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
    config.token_recovery = token_recovery or {}
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    with quiet():  # the layers that are left out would be told
        return AutoModel.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs).eval()


__all__ = ["DTYPES", "load", "load_image_encoder"]
