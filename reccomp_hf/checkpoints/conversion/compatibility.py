"""Checks that a LLaVA and a CLIP fit together: configs, keys and shapes, and the vision tower."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ...core import compat
from .shards import TEXT_SIDE, Headers, place_of, read_tensor

logger = logging.getLogger(__name__)

SIZES = ("hidden_size", "patch_size", "image_size", "num_hidden_layers")
"""Fields of a vision config that tell CLIPs apart."""
KNOWN_CLIPS = {
    (1024, 14, 336, 24): "openai/clip-vit-large-patch14-336",
    (1024, 14, 224, 24): "openai/clip-vit-large-patch14",
    (768, 32, 224, 12): "openai/clip-vit-base-patch32",
    (768, 16, 224, 12): "openai/clip-vit-base-patch16",
}
LEAST_COSINE = 0.5
"""Mean cosine of the weights below which two towers are unrelated."""


def guess_clip(vision: Any) -> str:
    """The Hub id of OpenAI's CLIP whose vision tower has the sizes of this one.

    Raises:
        ValueError: None of OpenAI's CLIPs has these sizes.
    """
    sizes = tuple(getattr(vision, name, None) for name in SIZES)
    if getattr(vision, "model_type", None) != "clip_vision_model" or sizes not in KNOWN_CLIPS:
        text = ", ".join(f"{name} {size}" for name, size in zip(SIZES, sizes, strict=True))
        raise ValueError(
            f"CLIP is missing, and LLaVA's vision tower ({text}) is not one of OpenAI's, so the CLIP cannot be "
            "guessed: name the CLIP that the tower came from, or make a visual-only model (--visual-only, clip=None)."
        )
    return KNOWN_CLIPS[sizes]


def check_clip(vision: Any, clip: Any) -> None:
    """Check that a CLIP's vision tower can be the one that LLaVA uses.

    Raises:
        ValueError: The width, patch size, image size or number of blocks differs.
    """
    for name in SIZES:
        ours, theirs = getattr(vision, name), getattr(clip.vision_config, name)
        if ours != theirs:
            raise ValueError(
                f"The CLIP does not fit LLaVA's vision tower: {name} is {theirs} in the CLIP and {ours} in LLaVA. "
                "Use the CLIP that the tower came from (for LLaVA-1.5 openai/clip-vit-large-patch14-336)."
            )


def check_keys(headers: Headers, model_class: Any, config: Any, name: str) -> None:
    """Compare the keys and shapes of a checkpoint with those of the model, which is built on the meta device.

    Raises:
        ValueError: Weights are missing, have another shape, or do not belong to the model.
    """
    with torch.device("meta"):
        model = model_class(config)
        layouts = [
            {place_of(key): tuple(value.shape) for key, value in states.items()}
            for states in (compat.state_on_disk(model), model.state_dict())
        ]
    # Weights that transformers merges or renames while it loads have other keys on disk than in memory.
    wanted = max(layouts, key=lambda layout: len(layout.keys() & headers.keys()) / len(layout))
    tied = {"lm_head.weight"} if any(_ties(part) for part in (config, config.get_text_config())) else set()
    missing = sorted(wanted.keys() - headers.keys() - tied)
    if missing:
        raise ValueError(
            f"{name} is not a complete {model_class.__name__}: {len(missing)} weights are missing, "
            f"{', '.join(missing[:3])} among them."
        )
    extra = sorted(headers.keys() - wanted.keys())
    if extra:
        raise ValueError(
            f"{name} holds {len(extra)} weights that a {model_class.__name__} of its config has no place for, "
            f"{', '.join(extra[:3])} among them: its config and its weights do not belong together, or the weights "
            "are adapters or quantised ones; convert the plain model."
        )
    for place, header in headers.items():
        if place in wanted and header.shape != wanted[place]:
            raise ValueError(
                f"{name}: {header.key} has shape {header.shape}, but its config asks for {wanted[place]}; "
                "config and weights do not belong together."
            )


def check_text_side(headers: Headers, name: str) -> None:
    """Check that a CLIP has the weights that token recovery needs."""
    for start in TEXT_SIDE:
        if not any(place.startswith(start) for place in headers):
            raise ValueError(f"{name} is not a complete CLIPModel: it has no weights {start}*; use a whole CLIP.")


def check_same_tower(llava: tuple[Path, Headers], clip: tuple[Path, Headers], *, force: bool = False) -> float | None:
    """Compare LLaVA's vision tower with the CLIP's, tensor by tensor, and warn if it was fine-tuned.

    Weights that differ only by the rounding to the narrower of the two dtypes are equal.

    Args:
        llava: Folder and headers of LLaVA.
        clip: Folder and headers of the CLIP.
        force: Accept a CLIP with an unrelated tower.

    Returns:
        The mean cosine of the weight matrices; `None` for equal towers.

    Raises:
        ValueError: Weights so different that LLaVA's tower cannot come from this CLIP, without `force`.
    """
    cosines, same = [], True
    for place, header in llava[1].items():
        if not place.startswith("vision_tower."):
            continue
        name = place.removeprefix("vision_tower.")
        theirs_header = clip[1].get(f"vision_model.{name}")
        if theirs_header is None or theirs_header.shape != header.shape:
            raise ValueError(f"The CLIP's vision tower has no {name} of the shape of LLaVA's, {header.shape}.")
        ours, theirs = read_tensor(llava[0], header), read_tensor(clip[0], theirs_header)
        same = same and (torch.equal(theirs.to(ours.dtype), ours) or torch.equal(ours.to(theirs.dtype), theirs))
        if ours.ndim > 1:
            cosines.append(torch.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0).item())
    if same:
        return None
    cosine = sum(cosines) / len(cosines)
    if cosine < LEAST_COSINE and not force:
        raise ValueError(
            f"LLaVA's vision tower does not come from this CLIP: the mean cosine of their weights is {cosine:.2f}. "
            "Use the CLIP that the tower came from, or clip=None (--visual-only); force=True (--force) accepts it."
        )
    origin = "it was fine-tuned, or is another CLIP's" if cosine >= LEAST_COSINE else "they are unrelated"
    logger.warning(
        f"LLaVA's vision tower differs from the CLIP's (mean cosine of their weights {cosine:.4f}): {origin}. The "
        "text encoder was trained with the CLIP's own tower, so it may tell less well which patches belong to the "
        "question, the worse the further the cosine is from 1. Compare with text_share 0 on your data."
    )
    return cosine


def text_encoder_config(clip: Any) -> dict[str, Any]:
    """The text encoder's config, with the projection width that CLIP keeps at its top level."""
    config = clip.text_config.to_diff_dict()
    config["projection_dim"] = clip.projection_dim
    config["model_type"] = "clip_text_model"
    for name in ("dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    return config


def _ties(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


__all__ = ["check_clip", "check_keys", "check_same_tower", "check_text_side", "guess_clip", "text_encoder_config"]
