"""Digests of a model, its processor, the data and its images: a run resumes only where all are those it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .rows import Picture

_BLOCK = 1 << 20
_DIGESTED_WHOLE = (".json", ".jsonl", ".csv", ".parquet")  # in a folder; images and Arrow files count by their size
_IGNORED_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "token_recovery")


def data_digest(source: str | Path) -> str:
    """Digest of a file's content; of a folder, names and sizes of its files and the content of its tables."""
    path, digest = Path(source), hashlib.sha256()
    if path.is_file():
        _add_content(digest, path)
        return digest.hexdigest()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()!r} {file.stat().st_size}\n".encode())
        if file.suffix in _DIGESTED_WHOLE:
            _add_content(digest, file)
    return digest.hexdigest()


def model_digest(model: Any) -> str:
    """Digest of the config, except for fields a run may override, and of the weights' names, shapes and first values.

    Reading all values would take as long as loading them, and training changes nearly every first value too.
    """
    configs = [digested_fields(config.to_dict()) for config in (model.config, model.generation_config)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if type(parameter) is nn.Parameter and not parameter.is_meta:  # neither quantised nor offloaded
            digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def processor_digest(processor: Any) -> str:
    """Digest of a processor's settings, those of its image processor, and its tokenizers."""
    parts = [processor.to_dict(), processor.image_processor.to_dict(), processor.chat_template]
    tokenizers = [tokenizer for tokenizer in (processor.tokenizer, processor.recovery_tokenizer) if tokenizer]
    described = [digested_fields(part) for part in parts] + [_tokenizer_rules(tokenizer) for tokenizer in tokenizers]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def images_digest(pictures: Iterable[Picture]) -> str:
    """Digest of images in reading order: resolved paths, sizes and times of files, or the bytes in the data."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(picture.identity()).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _tokenizer_rules(tokenizer: Any) -> Any:
    """Everything that a tokenizer's ids depend on, without the state of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}


def _add_content(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def digested_fields(value: Any) -> Any:
    """A config's values without those that runs may override or that say nothing about weights, at every depth."""
    if isinstance(value, dict):
        return {str(name): digested_fields(inner) for name, inner in value.items() if name not in _IGNORED_FIELDS}
    return value


__all__ = ["data_digest", "digested_fields", "images_digest", "model_digest", "processor_digest"]
