"""Loading a compressed LLaVA without the layers of its language model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModel

from .quiet import quiet


def load_image_encoder(
    pretrained_model_name_or_path: str | os.PathLike[str],
    token_recovery: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a compressed LLaVA without the layers of its language model, which `embed_images` does not need.

    The language model's embedding table is loaded: it tells image placeholders from text in a prompt.

    Args:
        pretrained_model_name_or_path: A compressed checkpoint: a folder or a Hub id.
        token_recovery: Fields of the config section to override.
        **kwargs: Further arguments of `from_pretrained`, such as `dtype`.

    Returns:
        A model without head, in eval mode, for choosing and embedding visual tokens; its `forward` is of no use.

    Raises:
        ValueError: Fields that do not fit, or weights that are missing.
    """
    kwargs.setdefault("trust_remote_code", False)  # never ask whether to run it: this package's classes are used
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=kwargs["trust_remote_code"])
    config.token_recovery = token_recovery or {}
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    with quiet():  # transformers would report the layers that are left out
        return AutoModel.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs).eval()


__all__ = ["load_image_encoder"]
