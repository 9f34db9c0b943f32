"""Checking that a folder is a complete compressed checkpoint, and completing it for a push."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor

from ..core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from ..core.remote_code import code_files, flat_sources, write_remote_code
from .cards import may_be_replaced, repo_of, write_card
from .json_files import read_json
from .weight_files import SAFETENSORS, WeightFiles

CONFIGS: dict[str, Any] = {config.model_type: config for config in (LlavaRecCompConfig, LlavaNextRecCompConfig)}
CHECKPOINT_FILES = (
    *SAFETENSORS,
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*.py",
    "README.md",
    "LICENSE*",
    "*.png",
)
"""Patterns of the files of a checkpoint; other files, such as a training run's, are not pushed."""
EXCLUDED_FILES = ("trainer_state.json", "*_results.json")
"""Patterns of files that match `CHECKPOINT_FILES` but come from a training run."""


def files_of(folder: Path) -> list[str]:
    """The files that make up a checkpoint, as paths inside the folder."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    found += [path for path in sorted((folder / "recovery_tokenizer").glob("*")) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found if _is_checkpoint_file(path.name)]


def _is_checkpoint_file(name: str) -> bool:
    wanted = any(fnmatch.fnmatch(name, pattern) for pattern in CHECKPOINT_FILES)
    return wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED_FILES)


def check_checkpoint(folder: Path) -> None:
    """Check that a folder holds a checkpoint that others can load.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The config is not ours, or weights, tokenizers or the processor are missing or cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, or is not a folder.")
    section = _check_config(folder)
    _check_weights(folder)
    _check_processor(folder, needs_recovery_tokenizer=section.text_encoder_config is not None)


def complete_folder(folder: Path, repo: str | None = None) -> None:
    """Write the code that loads the checkpoint without this package, and the model card, where they are missing.

    Code of an older layout is replaced. A card that nobody edited is rendered again if it does not name `repo`, the
    Hub id of the push.
    """
    if not _has_code(folder):
        write_remote_code(folder)
    card = folder / "README.md"
    if not card.is_file() or (repo is not None and _names_another_repo(card.read_text(encoding="utf-8"), repo)):
        write_card(folder, repo=repo)


def _names_another_repo(card: str, repo: str) -> bool:
    """Whether an unedited card does not name the repository."""
    try:
        return repo_of(card) != repo and may_be_replaced(card)
    except Exception:  # metadata that is not YAML was written by hand, and the Hub will report the error
        return False


def _check_config(folder: Path) -> TokenRecoveryConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json.")
    fields = read_json(path)
    model_type = fields.get("model_type")
    if model_type not in CONFIGS:
        raise ValueError(
            f"{folder} is not a compressed LLaVA: its model_type is {model_type!r}. "
            f"`reccomp-hf convert {folder} CLIP OUTPUT` makes one of a LLaVA."
        )
    return CONFIGS[model_type].from_dict(fields).token_recovery


def _check_weights(folder: Path) -> None:
    files = WeightFiles.find(folder)
    if not files.safetensors:
        raise ValueError(f"{folder} has no weights: neither model.safetensors nor an index with its shards.")
    if files.missing:
        raise ValueError(f"{folder} lacks {files.describe_missing()}.")
    for name, keys in files.keys.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                absent = keys - set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}. Is it truncated?") from error
        if absent:
            raise ValueError(f"{folder / name} lacks weights that the index puts there, {min(absent)} among them.")


def _check_processor(folder: Path, needs_recovery_tokenizer: bool) -> None:
    names = ["tokenizer_config.json", "processor_config.json"]
    names += ["recovery_tokenizer/tokenizer_config.json"] if needs_recovery_tokenizer else []
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: save the processor there too, processor.save_pretrained(folder)."
        )
    try:
        AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # JSON, tokenizers and transformers raise errors of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"The processor in {folder} cannot be loaded: {reason}") from error


def _has_code(folder: Path) -> bool:
    """Whether config and processor name code in the folder, and all files of the current layout are there."""
    for name in ("config.json", "processor_config.json"):
        classes = read_json(folder / name).get("auto_map") or {}
        modules = {value.rpartition("--")[2].split(".")[0] for value in classes.values() if isinstance(value, str)}
        if not modules or not all((folder / f"{module}.py").is_file() for module in modules):
            return False
    return flat_sources().keys() <= {file.name for file in code_files(folder)}


__all__ = ["check_checkpoint", "complete_folder", "files_of"]
