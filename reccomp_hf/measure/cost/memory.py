"""Memory of a LLaVA: parameters, key-value cache, and how many prompts fit next to the weights."""

from __future__ import annotations

from typing import Any

from transformers import CLIPTextConfig

from ...core.checks import is_tiled
from ...core.counting import patches_per_side
from .hardware import Hardware, get_hardware, get_width
from .operators import Stack

USABLE = 0.9
"""Share of an accelerator's memory that a model may fill; the rest is the runtime's and fragmentation."""
NEW_TOKENS = 64
"""Tokens of an answer for which the largest batch keeps room."""


def kv_cache_bytes(config: Any, tokens: int, dtype: str = "fp16") -> float:
    """Bytes of one row's keys and values: 2 x layers x key heads x head width x tokens, `dtype` wide."""
    stack = Stack.of(config.text_config, gated=True)
    return 2 * stack.layers * stack.key_width * tokens * get_width(dtype)


def parameter_counts(config: Any) -> dict[str, int]:
    """Parameters by part, from the config alone: those of the model that the config builds.

    Returns:
        `"vision_tower"`, `"projector"` (with the newline), `"language_model"`, `"token_recovery"` and `"total"`.
    """
    text, vision = config.text_config, config.vision_config
    language, tower = Stack.of(text, gated=True), Stack.of(vision, gated=False)
    width = language.width
    linears = sum(wide * high for wide, high in language.linears().values())
    biases = 0
    if getattr(text, "attention_bias", False) or text.model_type == "qwen2":
        biases += language.heads * language.head_width + 2 * language.key_width
        biases += width if text.model_type != "qwen2" else 0
    if getattr(text, "mlp_bias", False):
        biases += 2 * language.inner + width
    tied = getattr(config, "tie_word_embeddings", False)
    vocabulary = text.vocab_size * width * (1 if tied else 2)
    embedding = tower.width * (3 * vision.patch_size**2 + 1 + patches_per_side(config) ** 2 + 1)
    counts = {
        "vision_tower": embedding + _encoder_parameters(tower) + 4 * tower.width,
        "projector": (tower.width + width) * width + (2 * width if config.multimodal_projector_bias else 0),
        "language_model": vocabulary + language.layers * (linears + biases + 2 * width) + width,
        "token_recovery": _recovery_parameters(config),
    }
    counts["projector"] += width if is_tiled(config) else 0
    return {**counts, "total": sum(counts.values())}


def largest_batch(
    config: Any,
    tokens: int,
    *,
    hardware: str | Hardware = "A100",
    dtype: str = "fp16",
    new_tokens: int = NEW_TOKENS,
    stock: bool = False,
) -> int:
    """Number of prompts that fit next to the weights, with room for an answer; 0 if the weights alone do not fit.

    Counted are the weights (the language model's in `dtype`, the rest in 16 bit), each row's key-value cache and the
    widest activations of one layer, in `USABLE` of the memory. Attention is taken not to store its scores.

    Args:
        config: A LLaVA config, stock or ours.
        tokens: Tokens per prompt, visual ones included.
        hardware: A name in `HARDWARE` or a [`Hardware`].
        dtype: `"fp16"`, `"int8"` or `"int4"`.
        new_tokens: Length of the answer.
        stock: Leave CLIP's text side out.

    Raises:
        ValueError: Unknown hardware or dtype.
    """
    device = get_hardware(hardware)
    stack, width = Stack.of(config.text_config, gated=True), get_width(dtype)
    row = kv_cache_bytes(config, tokens + new_tokens, dtype) + tokens * (3 * stack.inner + 2 * stack.width) * width
    return max(int((USABLE * device.memory - weight_bytes(config, dtype, stock=stock)) // row), 0)


def weight_bytes(config: Any, dtype: str = "fp16", *, stock: bool = False) -> float:
    """Bytes of the weights: the language model's in `dtype`, the others in 16 bit; `stock` leaves CLIP's text out."""
    counts = parameter_counts(config)
    others = counts["vision_tower"] + counts["projector"] + (0 if stock else counts["token_recovery"])
    return counts["language_model"] * get_width(dtype) + others * get_width("fp16")


def _encoder_parameters(stack: Stack) -> int:
    """A CLIP encoder's blocks: linear layers and two norms, all with biases."""
    linears = sum(wide * high + high for wide, high in stack.linears().values())
    return stack.layers * (linears + 4 * stack.width)


def _recovery_parameters(config: Any) -> int:
    """CLIP's text side: text encoder, its projection and the visual one."""
    section = getattr(config, "token_recovery", None)
    encoder = None if section is None else section.text_encoder_config
    if encoder is None:
        return 0
    text = CLIPTextConfig(**encoder)
    embedding = (text.vocab_size + text.max_position_embeddings) * text.hidden_size
    projections = (text.hidden_size + config.vision_config.hidden_size) * text.projection_dim
    return embedding + _encoder_parameters(Stack.of(text, gated=False)) + 2 * text.hidden_size + projections


__all__ = ["NEW_TOKENS", "USABLE", "kv_cache_bytes", "largest_batch", "parameter_counts", "weight_bytes"]
