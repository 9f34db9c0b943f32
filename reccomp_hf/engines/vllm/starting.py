"""Starting vLLM on a checkpoint, with the settings that the commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def engine_options(
    folder: str | Path, token_recovery: Mapping[str, Any], dtype: str | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, or of its `EngineArgs`, for a checkpoint.

    Args:
        folder: The checkpoint.
        token_recovery: Fields of the config section to override.
        dtype: Data type of the weights; by default float32 on a CPU, and the checkpoint's own elsewhere.
        batch_size: Most requests in one step; by default vLLM's.

    Returns:
        The arguments. On a CPU nothing is compiled, which takes longer than many a run.

    Raises:
        ValueError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed: pip install 'reccomp_hf[vllm]' (on a CPU see engines/vllm/README.md), or use the "
            "engine transformers."
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    options: dict[str, Any] = {"max_num_seqs": batch_size} if batch_size else {}
    if token_recovery:
        options["hf_overrides"] = {"token_recovery": dict(token_recovery)}
    return {
        "model": str(folder),
        "dtype": dtype or ("float32" if on_cpu else "auto"),
        "enforce_eager": on_cpu,
        **options,
    }


def start_engine(*arguments: Any, **options: Any) -> Any:
    """A `vllm.LLM` with [`engine_options`], whose arguments these are.

    Raises:
        ValueError: vLLM is not installed, or cannot serve the checkpoint.
    """
    settings = engine_options(*arguments, **options)
    from vllm import LLM

    return LLM(**settings)


__all__ = ["engine_options", "start_engine"]
