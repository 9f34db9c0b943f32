"""The files of the text encoder's tokenizer in a checkpoint, and the length of its windows."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from .settings import is_int, shown

RECOVERY_TOKENIZER_FOLDER = "recovery_tokenizer"

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")


def window_length(tokenizer: Any, length: int | None) -> int | None:
    """The window length for a recovery tokenizer, `None` without one.

    Raises:
        ValueError: A length that no text encoder has, or one without a tokenizer.
    """
    if tokenizer is None:
        if length is not None:
            raise ValueError(
                f"recovery_max_length={length} needs a recovery_tokenizer, got None: pass the CLIP tokenizer of the "
                "text encoder, or recovery_max_length=None for a visual-only model."
            )
        return None
    if not hasattr(tokenizer, "model_max_length"):
        raise ValueError(f"recovery_tokenizer must be a CLIP tokenizer or None, got {shown(tokenizer)}.")
    length = tokenizer.model_max_length if length is None else length
    if not is_int(length) or not 3 <= length <= 1_000_000:
        raise ValueError(
            f"recovery_max_length must be the number of positions of the text encoder (77 for CLIP, at least 3): "
            f"got {shown(length)}."
        )
    return length


def load_recovery_tokenizer(source: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """Load the tokenizer from the sub-folder `recovery_tokenizer`, and from nowhere else.

    Args:
        source: A folder or a Hub id.
        kwargs: Arguments of `from_pretrained`, of which those for the Hub are read.

    Raises:
        OSError: There is none.
    """
    subfolder = "/".join(part for part in (kwargs.get("subfolder"), RECOVERY_TOKENIZER_FOLDER) if part)
    config = cached_path(source, "tokenizer_config.json", subfolder, kwargs)
    if config is None:
        raise OSError(
            f"{source} has recovery_max_length in its processor_config.json but no {subfolder}/tokenizer_config.json. "
            "Save it again with processor.save_pretrained, or pass recovery_tokenizer= to from_pretrained."
        )
    hub = _hub_arguments(kwargs)
    return AutoTokenizer.from_pretrained(source, subfolder=subfolder, trust_remote_code=False, **hub)


def cached_path(source: str | os.PathLike[str], name: str, subfolder: str, kwargs: dict[str, Any]) -> str | None:
    """Path of a file of a checkpoint, in a folder or the Hub client's cache; `None` if it is not there."""
    absent = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    return cached_file(source, name, subfolder=subfolder, **absent, **_hub_arguments(kwargs))


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


__all__ = ["RECOVERY_TOKENIZER_FOLDER", "cached_path", "load_recovery_tokenizer", "window_length"]
