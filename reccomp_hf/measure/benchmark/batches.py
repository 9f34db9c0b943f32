"""Inputs of the models: drawn scenes for a checkpoint with a processor, noise for random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from ...core.checks import is_tiled
from ...core.counting import PICTURE, picture_tokens
from ...core.rules import NO_RULE
from ..evaluation.samples import Sample, demo_samples, encode_samples

Inputs = dict[str, Any]
"""A model's input tensors by name, `recovery_input_ids` among them."""
TEXT_TOKENS, QUESTION_TOKENS = 60, 16


def scene_batch(
    model: Any, processor: Any, size: int, picture: tuple[int, int] | None = None, seed: int = 0
) -> Inputs:
    """Encode questions on drawn scenes with a checkpoint's processor, on the model's device.

    Args:
        model: A compressed LLaVA.
        processor: The model's processor.
        size: Number of rows, an image and a question each.
        picture: Width and height in pixels that the scenes are scaled to; `None` leaves them as drawn.
        seed: Number of scenes to skip.
    """
    samples = demo_samples(size, seed)
    if picture is not None:
        samples = [dataclasses.replace(sample, image=_scaled(sample, picture)) for sample in samples]
    return dict(encode_samples(processor, samples).to(model.device, model.dtype))


def _scaled(sample: Sample, picture: tuple[int, int]) -> Any:
    return sample.open().resize(picture)


def noise_batch(
    model: Any,
    size: int,
    picture: tuple[int, int] | None = None,
    seed: int = 0,
    text_tokens: int = TEXT_TOKENS,
    question_tokens: int = QUESTION_TOKENS,
) -> Inputs:
    """Make images of noise and random words, on the model's device.

    Args:
        model: A compressed LLaVA, of which config, device and dtype are used.
        size: Number of rows, each with an image and a question.
        picture: Width and height of the image in pixels, for LLaVA-NeXT; `None` is 640 x 480.
        seed: Seed of the noise.
        text_tokens: Tokens of a prompt that are not visual.
        question_tokens: Tokens of the question that CLIP reads.

    Raises:
        ValueError: Fewer than two text tokens, or a question longer than one window.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    picture = picture or PICTURE
    tiles, patches, newlines = picture_tokens(config, picture)
    if text_tokens < 2:
        raise ValueError(f"text tokens must be at least 2, got {text_tokens}.")
    words = torch.randint(3, config.image_token_id, (size, text_tokens), generator=generator)
    before = text_tokens // 4
    placeholders = torch.full((size, patches + newlines), config.image_token_id)
    ids = torch.cat([words[:, :before], placeholders, words[:, before:]], dim=1)
    side = config.vision_config.image_size
    tiled = is_tiled(config)
    shape = (size, tiles, 3, side, side) if tiled else (size, 3, side, side)
    inputs: Inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(shape, generator=generator).to(model.dtype),
    }
    if tiled:
        inputs["image_sizes"] = torch.tensor([[picture[1], picture[0]]] * size)
    encoder = config.token_recovery.text_encoder_config
    if encoder is not None:
        inputs["recovery_input_ids"] = _questions(CLIPTextConfig(**encoder), size, question_tokens, generator)
        inputs["recovery_attention_mask"] = torch.ones_like(inputs["recovery_input_ids"])
        asked = torch.randint(3, config.image_token_id, (size, question_tokens), generator=generator)
        inputs["recovery_words"] = asked
    if config.token_recovery.rules:
        inputs["recovery_rule"] = torch.full((size,), NO_RULE)  # random words begin like none
    return {name: value.to(model.device) for name, value in inputs.items()}


def _questions(encoder: CLIPTextConfig, size: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(size, 1, tokens) random words, the last one the end-of-text token."""
    if not 2 <= tokens <= encoder.max_position_embeddings:
        raise ValueError(f"question tokens must be 2 to {encoder.max_position_embeddings}, got {tokens}.")
    # Old CLIP configs have 2 here, where the highest id is meant.
    end = encoder.vocab_size - 1 if encoder.eos_token_id == 2 else encoder.eos_token_id
    words = torch.randint(3, end, (size, 1, tokens), generator=generator)
    words[..., -1] = end
    return words


__all__ = ["QUESTION_TOKENS", "TEXT_TOKENS", "Inputs", "noise_batch", "scene_batch"]
