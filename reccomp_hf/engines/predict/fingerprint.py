"""What answers depend on, so that a run goes on only where it was the same run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

_BLOCK = 1 << 20
_READ_WHOLE = (".json", ".jsonl", ".csv", ".parquet")  # in a folder; of its pictures and Arrow files the size counts
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "token_recovery")


def data_digest(source: str | Path) -> str:
    """Of a file its content; of a folder the names and sizes of its files, and the content of those that hold text."""
    path, digest = Path(source), hashlib.sha256()
    if path.is_file():
        _add_content(digest, path)
        return digest.hexdigest()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()!r} {file.stat().st_size}\n".encode())
        if file.suffix in _READ_WHOLE:
            _add_content(digest, file)
    return digest.hexdigest()


def model_digest(model: Any) -> str:
    """Of the config, but for what a run may override, and of names, shapes and first values of the weights.

    Not of all values, which takes as long as loading them; training changes nearly every first value too.
    """
    about = [_essence(config.to_dict()) for config in (model.config, model.generation_config)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if type(parameter) is nn.Parameter and not parameter.is_meta:  # neither quantised nor offloaded
            digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _add_content(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def _essence(value: Any) -> Any:
    """A config's values, at every depth without those that are told apart or say nothing."""
    if isinstance(value, dict):
        return {str(name): _essence(inner) for name, inner in value.items() if name not in _NOT_OF_THE_MODEL}
    return value


__all__ = ["data_digest", "model_digest"]
