"""The encoder side alone: what a picture and a question become before the language model reads them, for engines."""

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
    """A picture for the language model.

    Attributes:
        embeds: (K, D) in the model's dtype, as wide as the language model, in the order of the prompt: kept tokens
            (LLaVA-NeXT's with the newlines of rows that keep one), then merged ones.
        placeholders: How many placeholders the uncompressed picture has, in place of which these K stand.
        places: (K,) int64, which of these placeholders each token stands for, where the settings say
            `position_ids: "original"`: a token's position is its place's there. `None` where tokens are counted on.
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
    """Compress pictures, each by its question, as `generate` would before its prefill.

    Args:
        model: A compressed LLaVA, whole or from `load_image_encoder`.
        processor: Its processor.
        images: One for each question.
        questions: What is asked of each, without answer instructions; a visual-only model does not read them.
        token_recovery: Fields of the config section to override for this call.

    Returns:
        One [`ImageEmbeds`] per picture.

    Raises:
        ValueError: No pictures, not one question for each, an empty question, or `enabled: false`.
    """
    if not images or len(images) != len(questions):
        raise ValueError(f"There must be a question for each picture, got {len(images)} and {len(questions)}.")
    section = model.config.token_recovery.replace(token_recovery)
    if not section.enabled:
        raise ValueError("token_recovery.enabled is false: the stock model's get_image_features gives all tokens.")
    inputs = processor(
        images=list(images),
        text=[processor.image_token] * len(images),
        recovery_text=list(questions),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device, model.dtype)
    image_token, original = model.config.image_token_id, section.position_ids == "original"
    was_image = inputs["input_ids"] == image_token
    positions = counted_positions(inputs["attention_mask"])
    given = {"position_ids": positions} if original else {}
    short, _ = model.compress_inputs(**inputs, **given, token_recovery=token_recovery)
    is_image = short["input_ids"] == image_token
    before, after = torch.stack([was_image.sum(-1), is_image.sum(-1)]).tolist()
    embeds = short["inputs_embeds"][is_image].split(after)
    places: Sequence[Tensor | None] = [None] * len(after)
    if original:
        first = positions.gather(1, was_image.long().argmax(-1, keepdim=True))  # (R, 1)
        places = (short["position_ids"] - first)[is_image].split(after)
    return [ImageEmbeds(*row) for row in zip(embeds, before, places, strict=True)]


def image_embeds_part(embeds: Tensor) -> dict[str, str]:
    """The part of a chat message's content by which vLLM's server takes embeddings in place of a picture.

    The server must be started with `--enable-mm-embeds`, which is for clients that are trusted: it loads what
    `torch.save` wrote, here as base64.

    Args:
        embeds: (K, D).

    Raises:
        ValueError: Another shape.
    """
    if embeds.ndim != 2:
        raise ValueError(f"The embeddings of one picture have the shape (tokens, width), got {tuple(embeds.shape)}.")
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), file)  # a copy: of a view the whole storage would be written
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode()}


__all__ = ["ImageEmbeds", "embed_images", "image_embeds_part"]
