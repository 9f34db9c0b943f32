"""A cost model: estimated cost of a LLaVA on an accelerator before and after its visual tokens are cut.

A roofline estimate: every operator takes max(operations / peak, bytes / bandwidth). For the language model's prefill
it follows the accounting of the paper's table and reproduces it ([`prefill_cost`]). It adds what the table leaves
out: vision tower, text encoder, key-value cache, decoding, and the largest batch that fits. Not in it is the choice of
tokens: the benchmark measures it as less than 1 % of a prefill, most of which is launching small kernels, which a
roofline cannot see. Everything is a lower bound: real kernels take longer, and launching them is not counted.
"""

from __future__ import annotations

import functools
from typing import Any

from ...core.checks import is_tiled
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import PICTURE, compressed_tokens, patches_per_side, picture_tokens
from ...core.methods.registry import get_method, reads_encoded_question
from .hardware import DTYPES, HARDWARE, Hardware, get_hardware, get_width
from .memory import NEW_TOKENS, USABLE, kv_cache_bytes, largest_batch, parameter_counts, weight_bytes
from .operators import (
    Cost,
    Operator,
    Stack,
    linear,
    projector_operators,
    text_operators,
    vision_operators,
)


def prefill_cost(
    config: Any, tokens: int, *, hardware: str | Hardware = "A100", dtype: str = "fp16", batch: int = 1
) -> Cost:
    """Cost of the language model's prefill of `batch` prompts of `tokens` tokens, with the head on each last token.

    With LLaVA-1.5-7B at 636 and 116 tokens (60 of text and 576 or 56 visual ones) on an A100 it gives the paper's
    table. Vision tower and text encoder are not in it, see [`vision_cost`].

    Args:
        config: A LLaVA config, stock or ours.
        tokens: Tokens per prompt, visual ones included.
        hardware: A name in `HARDWARE` or a [`Hardware`].
        dtype: `"fp16"`, `"int8"` or `"int4"`, the type of weights, activations and cache.
        batch: Number of prompts.

    Returns:
        A [`Cost`]: `.flops`, `.seconds`, `.traffic_bytes`, `.activation_bytes` and the `.operators`.

    Raises:
        ValueError: Hardware or dtype is unknown, or `tokens` or `batch` is below 1.
    """
    return _language_cost(config, tokens, tokens, hardware, dtype, batch)


def decode_cost(
    config: Any, tokens: int, *, hardware: str | Hardware = "A100", dtype: str = "fp16", batch: int = 1
) -> Cost:
    """Cost of one further token for each of `batch` rows, with `tokens` tokens in the cache, the new one included.

    Args:
        config: A LLaVA config, stock or ours.
        tokens: Tokens that the new one attends to.
        hardware: A name in `HARDWARE` or a [`Hardware`].
        dtype: `"fp16"`, `"int8"` or `"int4"`.
        batch: Number of rows.

    Raises:
        ValueError: As for [`prefill_cost`].
    """
    return _language_cost(config, 1, tokens, hardware, dtype, batch)


def vision_cost(
    config: Any,
    tokens: int,
    *,
    tiles: int = 1,
    windows: int = 1,
    batch: int = 1,
    section: TokenRecoveryConfig | None = None,
    hardware: str | Hardware = "A100",
) -> dict[str, Cost]:
    """Cost of everything in front of the language model but the choice of tokens, in 16 bit.

    Args:
        config: A LLaVA config, stock or ours.
        tokens: Visual tokens per prompt that the projector reads. For a method that reads projected features the cost
            of projecting all patches is added.
        tiles: Tiles per prompt; 1 for LLaVA-1.5.
        windows: Windows of the question, each of the text encoder's length.
        batch: Number of prompts.
        section: The settings of token recovery, of whose rules the dearest counts; `None` for the stock model.
        hardware: A name in `HARDWARE` or a [`Hardware`].

    Returns:
        `"vision_tower"`, `"projector"` and `"text_encoder"`; the last is empty for the stock model.
    """
    _at_least_one(tokens=tokens, tiles=tiles, windows=windows, batch=batch)
    device = get_hardware(hardware)
    parts: dict[str, list[Operator]] = {
        "vision_tower": vision_operators(config, tiles * batch),
        "projector": projector_operators(config, tokens * batch),
        "text_encoder": [],
    }
    if section is not None and section.enabled:
        encoder, every = section.text_encoder_config, section.all_settings
        if any(get_method(settings.method).reads_projected for settings in every):
            parts["projector"] += projector_operators(config, patches_per_side(config) ** 2 * tiles * batch)
        if encoder is not None and reads_encoded_question(section):
            parts["text_encoder"] = text_operators(encoder, windows * batch)
    return {name: Cost(tuple(operators), device, "fp16") for name, operators in parts.items()}


def compare_costs(
    config: Any,
    visual_tokens: list[int] | None = None,
    *,
    hardware: str = "A100",
    dtype: str = "fp16",
    text_tokens: int = 60,
    batch: int = 1,
    picture: tuple[int, int] = PICTURE,
) -> dict[str, Any]:
    """Compare the stock model with the compressed one on one accelerator.

    Args:
        config: A config of a compressed LLaVA.
        visual_tokens: Numbers of visual tokens to compare, without newlines; `None` takes that of the settings,
            with rules the largest.
        hardware: A name in `HARDWARE`.
        dtype: `"fp16"`, `"int8"` or `"int4"`.
        text_tokens: Tokens of a prompt that are not visual.
        batch: Number of prompts, an image each.
        picture: Width and height of the image in pixels; used for LLaVA-NeXT only.

    Returns:
        Plain numbers for a table or JSON: `"rows"`, the stock model first, with tokens, FLOPs, seconds, bytes and
        ratios to it; `"parameters"`; and the assumptions. LLaVA-NeXT's newlines are counted as if all rows kept one.

    Raises:
        ValueError: Hardware or dtype is unknown, or a count is below 1 or above the image's number of patches.
    """
    section, device = config.token_recovery, get_hardware(hardware)
    tiles, patches, newlines = picture_tokens(config, picture)
    counts = [compressed_tokens(config, section, picture)] if visual_tokens is None else visual_tokens
    for count in counts:
        if not 1 <= count <= patches:
            raise ValueError(f"visual tokens must be 1 to {patches}, the image's number of patches, got {count}.")
    _at_least_one(batch=batch)
    if text_tokens < 1:
        raise ValueError(f"text tokens must be at least 1, got {text_tokens}.")
    row = functools.partial(
        _row, config, device=device, dtype=dtype, text_tokens=text_tokens, batch=batch, tiles=tiles
    )
    rows = [row(patches, newlines, None), *(row(count, min(newlines, count), section) for count in counts)]
    for entry in rows:
        entry["ratios"] = {name: entry[name] / rows[0][name] if rows[0][name] else None for name in RATIOS}
    return {
        "hardware": {"name": device.name, "source": device.source},
        "dtype": dtype,
        "batch": batch,
        "text_tokens": text_tokens,
        "picture": list(picture) if is_tiled(config) else None,
        "tiles": tiles,
        "largest_of_rules": bool(section.rules) and visual_tokens is None,
        "measured": False,
        "parameters": parameter_counts(config),
        "rows": rows,
    }


RATIOS = ("prefill_flops", "prefill_seconds", "first_token_seconds", "kv_cache_bytes", "largest_batch")
"""Entries of a row of [`compare_costs`] that are also given as ratios to the stock model's."""


def _row(
    config: Any,
    visual: int,
    newlines: int,
    section: TokenRecoveryConfig | None,
    *,
    device: Hardware,
    dtype: str,
    text_tokens: int,
    batch: int,
    tiles: int,
) -> dict[str, Any]:
    tokens = text_tokens + visual + newlines
    prefill = prefill_cost(config, tokens, hardware=device, dtype=dtype, batch=batch)
    projected = (
        visual if section is not None else tiles * patches_per_side(config) ** 2
    )  # stock projects before it unpads
    before = vision_cost(config, projected, tiles=tiles, batch=batch, section=section, hardware=device)
    fits = largest_batch(config, tokens, hardware=device, dtype=dtype, stock=section is None)
    step = decode_cost(config, tokens + NEW_TOKENS // 2, hardware=device, dtype=dtype, batch=batch)
    full = decode_cost(config, tokens + NEW_TOKENS // 2, hardware=device, dtype=dtype, batch=max(fits, 1))
    return {
        "compressed": section is not None,
        "visual_tokens": visual,
        "newline_tokens": newlines,
        "prompt_tokens": tokens,
        "prefill_flops": prefill.flops,
        "prefill_seconds": prefill.seconds,
        "prefill_traffic_bytes": prefill.traffic_bytes,
        "prefill_activation_bytes": prefill.activation_bytes,
        **{f"{name}_seconds": cost.seconds for name, cost in before.items()},
        "first_token_seconds": prefill.seconds + sum(cost.seconds for cost in before.values()),
        "kv_cache_bytes": kv_cache_bytes(config, tokens, dtype) * batch,
        "decode_seconds": step.seconds,
        "weight_bytes": weight_bytes(config, dtype, stock=section is None),
        "largest_batch": fits,
        "largest_batch_tokens_per_second": fits / full.seconds,
    }


def _language_cost(config: Any, new: int, context: int, hardware: str | Hardware, dtype: str, batch: int) -> Cost:
    _at_least_one(tokens=context, batch=batch)
    get_width(dtype)
    device = get_hardware(hardware)
    text = config.text_config
    head = linear("head", batch, text.hidden_size, text.vocab_size)
    return Cost((*Stack.of(text, gated=True).operators(new, context, batch), head), device, dtype)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


__all__ = [
    "DTYPES",
    "HARDWARE",
    "NEW_TOKENS",
    "USABLE",
    "Cost",
    "Hardware",
    "Operator",
    "compare_costs",
    "decode_cost",
    "kv_cache_bytes",
    "largest_batch",
    "parameter_counts",
    "prefill_cost",
    "vision_cost",
    "weight_bytes",
]
