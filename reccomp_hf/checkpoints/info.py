"""What a compressed checkpoint is, from its config and the headers of its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from ..core.configuration import LlavaNextRecCompConfig, TokenRecoveryConfig
from ..core.counting import blank_selection
from ..core.methods.registry import get_method
from ..demo import CHECKPOINTS, checkpoint_folder
from .hub import resolve

# Where a weight belongs, by a piece of its name; what has none of these is the language model's.
PARTS = {
    "token_recovery.": "token_recovery",
    "vision_tower.": "vision_tower",
    "multi_modal_projector.": "projector",
    "image_newline": "projector",
}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def folder_of(name: str) -> Path:
    """The folder of that name, a shipped checkpoint's, or what the Hub's repository holds besides weights.

    Raises:
        OSError: It is neither, or the Hub cannot be reached.
    """
    if name in CHECKPOINTS and not Path(name).is_dir():
        return checkpoint_folder(name)
    return resolve(name, weights=False)


def describe(folder: Path, name: str) -> dict[str, Any]:
    """What a checkpoint is, from its config and the headers of its weights; `name` is what the user calls it."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no checkpoint: it has no config.json.")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    section = getattr(config, "token_recovery", None)
    if not isinstance(section, TokenRecoveryConfig):
        if config.model_type in ("llava", "llava_next"):
            raise ValueError(
                f"{name} is a stock LLaVA (model_type {config.model_type!r}) without token recovery: "
                f"`reccomp-hf convert {name} CLIP OUTPUT` makes a compressed model of it."
            )
        raise ValueError(f"{name} is no compressed LLaVA: its model_type is {config.model_type!r}.")
    weights = sorted(folder.glob("model*.safetensors"))
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
    """The method, and every field that differs from its default, but for the text encoder's config."""
    usual, values = TokenRecoveryConfig().to_dict(), section.to_dict()
    names = [name for name in usual if name == "method" or values[name] != usual[name]]
    return {name: values[name] for name in names if name != "text_encoder_config"}


def _count_parameters(weights: list[Path]) -> tuple[dict[str, int], list[str]]:
    """Parameters by part, and the dtypes, out of the headers of safetensors files; empty without files."""
    counts, dtypes = dict.fromkeys(("vision_tower", "projector", "language_model", "token_recovery"), 0), set()
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 it is no dict
                tensor = file.get_slice(key)
                part = next((part for piece, part in PARTS.items() if piece in key), "language_model")
                counts[part] += math.prod(tensor.get_shape())
                dtypes.add(DTYPES.get(tensor.get_dtype(), tensor.get_dtype()))
    return ({**counts, "total": sum(counts.values())} if weights else {}), sorted(dtypes)


def _tokens_per_image(config: Any, section: TokenRecoveryConfig) -> dict[str, Any]:
    """Visual tokens of a picture before and after, `None` where the picture decides, and a sentence about it."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    tiled = config.model_type == LlavaNextRecCompConfig.model_type
    before = None if tiled else side * side
    all_of_them = f"{side * side}{' per tile' if tiled else ''}"
    newlines = " per picture, and a newline for each of its rows that keeps one" if tiled else ""
    if not section.enabled:
        return {"before": before, "after": before, "note": f"{all_of_them} remain: enabled is false, the stock model"}
    after = section.budget if tiled else _fixed_count(side, section)
    if isinstance(after, float):
        return {"before": before, "after": None, "note": f"{all_of_them} become {after:.0%} of them{newlines}"}
    if after is not None:
        number = str(after) if tiled else f"{after} ({after / side**2:.0%})"
        return {"before": before, "after": after, "note": f"{all_of_them} become {number}{newlines}"}
    reads_question = get_method(section.method).reads_question(section) and section.text_encoder_config is not None
    asking = "the picture and the question ask" if reads_question else "the picture asks"
    note = f"{all_of_them} become as many as {asking} for; model.recover(**inputs) counts them"
    return {"before": before, "after": None, "note": note}


def _fixed_count(side: int, section: TokenRecoveryConfig) -> int | None:
    """How many tokens a grid of side x side patches always becomes, `None` if it depends on the picture.

    The method is run on a blank picture of width 1: it knows by itself what is fixed.
    """
    sizes = blank_selection(section, 1, side).known_sizes
    return None if sizes is None else sizes.longest


__all__ = ["describe", "folder_of"]
