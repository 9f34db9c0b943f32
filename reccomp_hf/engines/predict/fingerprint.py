"""Digests of a model, its processor, the data and its images: a run resumes only where all are those it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoints.weight_files import WeightFiles, open_shard
from ...data.rows import Picture

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
    configs = [_digested_fields(config.to_dict()) for config in (model.config, model.generation_config)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if type(parameter) is nn.Parameter and not parameter.is_meta:  # neither quantised nor offloaded
            digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def checkpoint_digest(folder: str | Path) -> str:
    """Digest of a checkpoint's config, and of its weights' names, shapes and first values, as [`model_digest`].

    Raises:
        ValueError: There are no safetensors files, or one is damaged.
    """
    source = Path(folder)
    files = [file for name in ("config.json", "generation_config.json") if (file := source / name).is_file()]
    configs = [_digested_fields(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    weights = WeightFiles.find(source)
    if not (weights.complete and weights.safetensors):
        raise ValueError(f"{folder} has no safetensors files, or not all of them: save or download it again.")
    for path in weights.present:
        with open_shard(path) as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                digest.update(f"{name} {part.get_shape()}".encode())
                value = part[:1] if part.get_shape() else file.get_tensor(name)
                digest.update(value.flatten()[:4].float().numpy().tobytes())
    return digest.hexdigest()


def processor_digest(processor: Any) -> str:
    """Digest of a processor's settings, those of its image processor, and its tokenizers."""
    parts = [processor.to_dict(), processor.image_processor.to_dict(), processor.chat_template]
    tokenizers = [tokenizer for tokenizer in (processor.tokenizer, processor.recovery_tokenizer) if tokenizer]
    described = [_digested_fields(part) for part in parts] + [_tokenizer_rules(tokenizer) for tokenizer in tokenizers]
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


def _digested_fields(value: Any) -> Any:
    """A config's values without the ignored fields, at every depth."""
    if isinstance(value, dict):
        return {str(name): _digested_fields(inner) for name, inner in value.items() if name not in _IGNORED_FIELDS}
    return value


__all__ = ["checkpoint_digest", "data_digest", "images_digest", "model_digest", "processor_digest"]
