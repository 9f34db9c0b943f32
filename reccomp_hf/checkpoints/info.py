"""Describing a compressed checkpoint by its config and the headers of its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..core.checks import check_supported, is_tiled
from ..core.configuration import TokenRecoveryConfig
from ..core.counting import blank_selection, patches_per_side
from ..core.features import Sizes
from ..core.methods.registry import reads_question
from ..demo import CHECKPOINTS, checkpoint_folder
from .hub import resolve
from .processors import check_generation_config, check_processor_files, load_config
from .weight_files import WeightFiles, open_shard

# Piece of a weight's name -> part of the model; all other weights belong to the language model.
PARTS = {
    "token_recovery.": "token_recovery",
    "vision_tower.": "vision_tower",
    "multi_modal_projector.": "projector",
    "image_newline": "projector",
}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def folder_of(name: str) -> Path:
    """The folder of a name: a shipped checkpoint's, the one that it names, or a download from the Hub without weights.

    Raises:
        OSError: There is no such checkpoint, or the Hub cannot be reached.
    """
    if name in CHECKPOINTS and not Path(name).is_dir():
        return checkpoint_folder(name)
    return resolve(name, weights=False)


def describe(folder: Path, name: str) -> dict[str, Any]:
    """Settings, visual tokens, parameters and files of a checkpoint; `name` is the user's name of it, for messages.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The checkpoint is not a compressed LLaVA, or its processor or weights are damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is not a checkpoint: it has no config.json.")
    config = load_config(folder)
    section = getattr(config, "token_recovery", None)
    if not isinstance(section, TokenRecoveryConfig):
        if config.model_type in ("llava", "llava_next"):
            raise ValueError(
                f"{name} is a stock LLaVA (model_type {config.model_type!r}) without token recovery: "
                f"`reccomp-hf convert {name} CLIP OUTPUT` makes a compressed model of it."
            )
        raise ValueError(f"{name} is not a compressed LLaVA: its model_type is {config.model_type!r}.")
    check_supported(config, section)
    if (folder / "processor_config.json").is_file():
        check_processor_files(folder, config)
    check_generation_config(folder)
    found = WeightFiles.find(folder)
    if found.missing and Path(name).expanduser().is_dir():  # of a Hub repository only the index is here
        raise ValueError(f"{name} lacks {found.describe_missing()}: copy or download it again.")
    weights = found.present if found.safetensors and found.complete else []
    parameters, dtypes = _count_parameters(weights)
    return {
        "name": name,
        "model_type": config.model_type,
        "settings": _settings(section),
        "tokens_per_image": _tokens_per_image(config, section),
        "dtypes": dtypes,
        "parameters": parameters,
        "files": {
            "weights": [path.name for path in weights],
            "weight_bytes": sum(path.stat().st_size for path in weights),
            "recovery_tokenizer": (folder / "recovery_tokenizer" / "tokenizer_config.json").is_file(),
        },
        "token_recovery": section.to_dict(),
    }


def _settings(section: TokenRecoveryConfig) -> dict[str, Any]:
    """The method, and every overridable field that differs from its default."""
    defaults = TokenRecoveryConfig().overridable()
    return {
        name: value for name, value in section.overridable().items() if name == "method" or value != defaults.get(name)
    }


def _count_parameters(weights: list[Path]) -> tuple[dict[str, int], list[str]]:
    """Number of parameters by part, and the dtypes, from the headers of safetensors files; empty without files."""
    counts, dtypes = dict.fromkeys(("vision_tower", "projector", "language_model", "token_recovery"), 0), set()
    for path in weights:
        with open_shard(path) as file:
            for key in file.keys():  # noqa: SIM118 not a dict
                tensor = file.get_slice(key)
                part = next((part for piece, part in PARTS.items() if piece in key), "language_model")
                counts[part] += math.prod(tensor.get_shape())
                dtypes.add(DTYPES.get(tensor.get_dtype(), tensor.get_dtype()))
    return ({**counts, "total": sum(counts.values())} if weights else {}), sorted(dtypes)


def _tokens_per_image(config: Any, section: TokenRecoveryConfig) -> dict[str, Any]:
    """Visual tokens of an image before and after, `None` if they depend on image or question, and a note about it."""
    found = _tokens_under(config, section.of_rule(-1))
    if not section.rules or not section.enabled:
        return found
    numbers = [_number(_tokens_under(config, settings)["after"], settings) for settings in section.of_rules]
    return {**found, "after": None, "note": f"{found['note']}; by rule: {', '.join(numbers)}"}


def _number(after: int | None, section: TokenRecoveryConfig) -> str:
    if after is None:
        return f"{section.budget:.0%}" if isinstance(section.budget, float) else "as many as the image needs"
    return str(after)


def _tokens_under(config: Any, section: TokenRecoveryConfig) -> dict[str, Any]:
    """The same for a section without rules."""
    patches, tiled = patches_per_side(config) ** 2, is_tiled(config)
    before = None if tiled else patches
    stock = f"{patches}{' per tile' if tiled else ''}"
    newlines = " per image, and a newline for each of its rows that keeps a token" if tiled else ""
    if not section.enabled:
        return {"before": before, "after": before, "note": f"{stock} remain: enabled is false, the stock model"}
    after = section.budget if tiled else _fixed_count(config, section)
    if isinstance(after, float):
        return {"before": before, "after": None, "note": f"{stock} become {after:.0%} of them{newlines}"}
    if after is not None:
        number = str(after) if tiled else f"{after} ({after / patches:.0%})"
        return {"before": before, "after": after, "note": f"{stock} become {number}{newlines}"}
    reads = section.text_encoder_config is not None and reads_question(section)
    deciding = "the image and the question" if reads else "the image"
    note = f"{stock} become a number that depends on {deciding}; model.recover(**inputs) counts them"
    return {"before": before, "after": None, "note": note}


def _fixed_count(config: Any, section: TokenRecoveryConfig) -> int | None:
    """The exact number of tokens of every LLaVA-1.5 image, as the method gives it; `pooling` rounds to whole cells.

    Raises:
        ValueError: A budget above the number of patches.
    """
    sizes = blank_selection(section, 1, patches_per_side(config)).known_sizes
    return sizes.longest if isinstance(sizes, Sizes) else None


__all__ = ["describe", "folder_of"]
