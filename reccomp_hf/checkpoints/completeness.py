"""Whether a folder is a whole checkpoint of ours, and what a push adds to it."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

from ..core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from ..core.remote_code import write_remote_code
from .cards import may_be_replaced, repo_of, write_card

CONFIGS: dict[str, Any] = {config.model_type: config for config in (LlavaRecCompConfig, LlavaNextRecCompConfig)}
FORMATS = (  # the file with all weights, and the index of shards, in the order in which transformers looks for them
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PARTS_OF_IT = (  # of a checkpoint: what a training run left beside it stays where it is
    "model*.safetensors",
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
NO_PARTS_OF_IT = ("trainer_state.json", "*_results.json")


def files_of(folder: Path) -> list[str]:
    """The files that make up a checkpoint, folders in front of their names."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    found += [path for path in sorted((folder / "recovery_tokenizer").glob("*")) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found if _is_part(path.name)]


def _is_part(name: str) -> bool:
    wanted = any(fnmatch.fnmatch(name, pattern) for pattern in PARTS_OF_IT)
    return wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in NO_PARTS_OF_IT)


def missing_shards(folder: Path) -> list[str]:
    """Shards that are not there, of the weights that transformers would load from the folder."""
    for whole, index in FORMATS:
        if (folder / whole).is_file():
            return []
        if (folder / index).is_file():
            return sorted(name for name in shards_of(folder / index) if not (folder / name).is_file())
    return []


def shards_of(index: Path) -> dict[str, set[str]]:
    """The files that an index names, with the weights that each holds."""
    shards: dict[str, set[str]] = {}
    for key, name in _read_json(index).get("weight_map", {}).items():
        shards.setdefault(name, set()).add(key)
    return shards


def check_checkpoint(folder: Path) -> None:
    """Refuse to publish what nobody could load.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The config is not ours, or weights, tokenizers or the processor are missing or cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    section = _check_config(folder)
    _check_weights(folder)
    _check_processor(folder, needs_recovery_tokenizer=section.text_encoder_config is not None)


def complete_folder(folder: Path, repo: str | None = None) -> None:
    """Write what makes the checkpoint load without this package, and the model card, where they are missing.

    A card that nobody edited is written anew where it does not name `repo`, the Hub id that it will stand at.
    """
    if not _has_code(folder):
        write_remote_code(folder)
    card = folder / "README.md"
    if not card.is_file() or (repo is not None and _is_for_elsewhere(card.read_text(encoding="utf-8"), repo)):
        write_card(folder, repo=repo)


def _is_for_elsewhere(card: str, repo: str) -> bool:
    """Whether a card does not name the repository, and nobody's work is in it."""
    try:
        return repo_of(card) != repo and may_be_replaced(card)
    except Exception:  # metadata that is no YAML: somebody wrote it by hand, and the Hub will say what is wrong
        return False


def _check_config(folder: Path) -> TokenRecoveryConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json.")
    fields = _read_json(path)
    model_type = fields.get("model_type")
    if model_type not in CONFIGS:
        raise ValueError(
            f"{folder} is no compressed LLaVA: its model_type is {model_type!r}. "
            f"`reccomp-hf convert {folder} CLIP OUTPUT` makes one of a LLaVA."
        )
    return CONFIGS[model_type].from_dict(fields).token_recovery


def _check_weights(folder: Path) -> None:
    whole, index = FORMATS[0]
    if (folder / whole).is_file():
        shards: dict[str, set[str]] = {whole: set()}
    elif (folder / index).is_file():
        shards = shards_of(folder / index)
    else:
        raise ValueError(f"{folder} has no weights: neither {whole} nor {index} with its shards.")
    if missing := missing_shards(folder):
        raise ValueError(f"{folder} lacks {len(missing)} of its weight files, {missing[0]} among them.")
    for name, keys in shards.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                absent = keys - set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}. Was it written to its end?") from error
        if absent:
            raise ValueError(f"{folder / name} lacks weights that the index says it has, {min(absent)} among them.")


def _check_processor(folder: Path, needs_recovery_tokenizer: bool) -> None:
    names = ["tokenizer_config.json", "processor_config.json"]
    names += ["recovery_tokenizer/tokenizer_config.json"] if needs_recovery_tokenizer else []
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: save the processor there too, processor.save_pretrained(folder)."
        )
    try:
        AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many libraries: JSON, tokenizers, transformers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"The processor in {folder} cannot be loaded: {reason}") from error


def _has_code(folder: Path) -> bool:
    """Whether config and processor name code, and all of it is there with what it imports."""
    for name in ("config.json", "processor_config.json"):
        classes = _read_json(folder / name).get("auto_map") or {}
        modules = {value.rpartition("--")[2].split(".")[0] for value in classes.values() if isinstance(value, str)}
        files = [folder / f"{module}.py" for module in modules]
        try:
            needed = [file for module in files for file in get_relative_import_files(module)]
        except OSError:  # a file that it reads is missing
            return False
        if not files or not all(Path(file).is_file() for file in needed):
            return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return values


__all__ = ["check_checkpoint", "complete_folder", "files_of", "missing_shards"]
