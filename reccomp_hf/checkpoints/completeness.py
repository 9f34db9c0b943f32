"""Checking that a folder is a complete compressed checkpoint, and completing it for a push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME

from ..core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from ..core.recovery_tokenizer import RECOVERY_TOKENIZER_FOLDER
from ..core.remote_code import code_files, flat_sources, write_remote_code
from .cards import may_be_replaced, repo_of, write_card
from .json_files import read_json
from .processors import load_processor
from .weight_files import FORMATS, WeightFiles, open_shard

CONFIGS: dict[str, Any] = {config.model_type: config for config in (LlavaRecCompConfig, LlavaNextRecCompConfig)}
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Names of the files of a tokenizer."""
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "conversion.json",
    "tuning.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    *TOKENIZER_FILES,
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""Names of the files of a checkpoint besides its weights, code and recovery tokenizer; no other file is pushed."""


def files_of(folder: Path) -> list[str]:
    """The files that make up a checkpoint, as paths inside the folder.

    Raises:
        ValueError: One of them, not a weight file, is a link, which could lead to any file of this machine.
    """
    weights = WeightFiles.find(folder)
    names = {*CHECKPOINT_FILES, *flat_sources(), *(path.name for path in code_files(folder))}
    names |= {f"{RECOVERY_TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES}
    names |= {index for single, index in FORMATS if single == SAFE_WEIGHTS_NAME}
    for name in sorted({RECOVERY_TOKENIZER_FOLDER, *names}):
        if (folder / name).is_symlink():
            raise ValueError(
                f"{folder / name} is a link to {(folder / name).readlink()}. Only weight files may be links: put the "
                "file itself there, or remove the link."
            )
    return sorted(name for name in {*names, *weights.names} if (folder / name).is_file())


def check_checkpoint(folder: Path) -> None:
    """Check that a folder holds a checkpoint that others can load.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The config is not ours, or weights, tokenizers or the processor are missing or cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, or is not a folder.")
    files_of(folder)
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
        with open_shard(folder / name) as file:
            absent = keys - set(file.keys())
        if absent:
            raise ValueError(f"{folder / name} lacks weights that the index puts there, {min(absent)} among them.")


def _check_processor(folder: Path, needs_recovery_tokenizer: bool) -> None:
    names = ["tokenizer_config.json", "processor_config.json"]
    names += ["recovery_tokenizer/tokenizer_config.json"] if needs_recovery_tokenizer else []
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: save the processor there too, processor.save_pretrained(folder)."
        )
    load_processor(folder)


def _has_code(folder: Path) -> bool:
    """Whether config and processor name code in the folder, and all files of the current layout are there."""
    for name in ("config.json", "processor_config.json"):
        classes = read_json(folder / name).get("auto_map") or {}
        modules = {value.rpartition("--")[2].split(".")[0] for value in classes.values() if isinstance(value, str)}
        if not modules or not all((folder / f"{module}.py").is_file() for module in modules):
            return False
    return flat_sources().keys() <= {file.name for file in code_files(folder)}


__all__ = ["check_checkpoint", "complete_folder", "files_of"]
