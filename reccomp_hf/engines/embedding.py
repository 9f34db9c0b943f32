"""Compressed images as embeddings for the language model of another engine."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.splicing import counted_positions


@dataclasses.dataclass(frozen=True)
class ImageEmbeds:
    """The embeddings of an image.

    Attributes:
        embeds: (K, D) in the model's dtype and the language model's width, in the order of the prompt: kept tokens
            (with LLaVA-NeXT's newlines of rows that keep one), then merged tokens.
        placeholders: Number of placeholders of the uncompressed image, which the K tokens replace.
        places: (K,) int64, the index of the placeholder that each token stands for, and whose position it has, with
            `position_ids: "original"`; `None` if positions are consecutive.
    """

    embeds: Tensor
    placeholders: int
    places: Tensor | None


@torch.no_grad()
def embed_images(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    token_recovery: Mapping[str, Any] | None = None,
) -> list[ImageEmbeds]:
    """Compress images, each for its question, as `generate` does before its prefill.

    Args:
        model: A compressed LLaVA, whole or from `load_image_encoder`.
        processor: The processor of the model.
        images: One image per question.
        questions: One question per image, without answer instructions; a visual-only model does not read them.
        token_recovery: Fields of the config section to override for this call.

    Returns:
        One [`ImageEmbeds`] per image.

    Raises:
        ValueError: No images, another number of questions than of images, an empty question, or `enabled: false`.
    """
    if not images or len(images) != len(questions):
        raise ValueError(
            f"There must be one question per image, got {len(images)} images and {len(questions)} questions."
        )
    section = model.config.token_recovery.replace(token_recovery)
    if not section.enabled:
        raise ValueError("token_recovery.enabled is false: the stock model's get_image_features gives all tokens.")
    inputs = processor(
        images=list(images),
        text=[processor.image_token] * len(images),
        recovery_text=list(questions),
        recovery_rules=section.rules,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device, model.dtype)
    image_token, original = model.config.image_token_id, section.position_ids == "original"
    was_image = inputs["input_ids"] == image_token
    positions = counted_positions(inputs["attention_mask"])
    optional = {"position_ids": positions} if original else {}
    short, _ = model.compress_inputs(**inputs, **optional, token_recovery=token_recovery)
    is_image = short["input_ids"] == image_token
    before, after = torch.stack([was_image.sum(-1), is_image.sum(-1)]).tolist()
    embeds = short["inputs_embeds"][is_image].split(after)
    places: Sequence[Tensor | None] = [None] * len(after)
    if original:
        first = positions.gather(1, was_image.long().argmax(-1, keepdim=True))  # (R, 1)
        places = (short["position_ids"] - first)[is_image].split(after)
    return [ImageEmbeds(*row) for row in zip(embeds, before, places, strict=True)]


def image_embeds_part(embeds: Tensor) -> dict[str, str]:
    """Embeddings in place of an image: a part of a chat message's content for vLLM's server.

    The server must be started with `--enable-mm-embeds`, which is for trusted clients only: it loads files written by
    `torch.save`, sent as base64.

    Args:
        embeds: (K, D).

    Raises:
        ValueError: `embeds` has another shape.
    """
    if embeds.ndim != 2:
        raise ValueError(f"The embeddings of one image have the shape (tokens, width), got {tuple(embeds.shape)}.")
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), file)  # a copy: for a view, the whole storage would be written
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode()}


__all__ = ["ImageEmbeds", "embed_images", "image_embeds_part"]
