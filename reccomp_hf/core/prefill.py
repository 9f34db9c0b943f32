"""The language model's prefill by a recorded computation: left-padded to a common length, without its cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from .checks import cache_length
from .compat import CACHE, cache_of, fill_cache
from .graphs import GraphCache

STEP = 32
"""Prompts are padded on the left to a multiple of this length, so that few lengths are recorded."""
MOST_TOKENS = 1024
"""Largest number of tokens of a batch that is recorded: above it an H100 computes longer than it takes to launch."""

_READ = {"inputs_embeds", "attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE, "past_key_values"}
_WITHOUT_EFFECT = {"input_ids", "cache_position", "return_dict"}  # of a prefill


def recorded_prefill(model: Any, graphs: GraphCache, stock: Any, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a stock prefill's output, run by a recording.

    Args:
        model: A compressed LLaVA with a head.
        graphs: The model's recordings.
        stock: The stock `forward`.
        inputs: The arguments of `stock`.

    Returns:
        Logits of the last token and the cache; `None` if `stock` itself must be called.
    """
    if not _is_prefill(model, inputs):
        return None
    embeds, cache = inputs["inputs_embeds"], cache_of(inputs)
    rows, length = embeds.shape[:2]
    missing = -length % STEP
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=embeds.device)
    mask = additive_mask(inputs.get("attention_mask"), embeds, missing)
    tensors = {
        "inputs_embeds": torch.nn.functional.pad(embeds, (0, 0, missing, 0)),
        "attention_mask": mask,
        "position_ids": torch.nn.functional.pad(positions.expand(rows, -1), (missing, 0)),
    }
    cache = DynamicCache() if cache is None else cache
    modules = (model.model.language_model, model.lm_head)
    take = functools.partial(_take, cache, missing)
    return graphs.run("language model", modules, (), functools.partial(_prefill, stock), tensors, take)


def _take(cache: Any, missing: int, outputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a recording's keys and values to an empty cache, without padding, and return the fields of an output."""
    # A dynamic layer appends by a copy; of other kinds of layers only the static one is known not to keep its input.
    copies = type(cache) in (DynamicCache, StaticCache)
    for layer in range(sum(name.startswith("keys") for name in outputs)):
        states = (outputs[f"{part} {layer}"][:, :, missing:] for part in ("keys", "values"))
        fill_cache(cache, layer, *(part if copies else part.clone() for part in states))
    return {"logits": outputs["logits"].clone(), CACHE: cache}


def additive_mask(mask: Tensor | None, embeds: Tensor, missing: int) -> Tensor:
    """The mask of a prefill with columns added on the left.

    Args:
        mask: (R, L) with 0 for padding, (R, 1, L, L or more) bool or additive, or `None` for no padding.
        embeds: (R, L, D).
        missing: M, number of columns to add.

    Returns:
        (R, 1, M + L, M + L) in the dtype of `embeds`: 0 where a token is read, elsewhere the lowest number.
    """
    rows, length = embeds.shape[:2]
    if mask is not None and mask.ndim == 4:
        reads = mask[..., :length] if mask.dtype == torch.bool else mask[..., :length] == 0
    else:
        reads = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril().expand(rows, 1, -1, -1)
        if mask is not None:
            reads = reads & (mask != 0)[:, None, None]
    reads = torch.nn.functional.pad(reads, (missing, 0, missing, 0))
    return torch.zeros_like(reads, dtype=embeds.dtype).masked_fill(~reads, torch.finfo(embeds.dtype).min)


def _is_prefill(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a call starts an answer that is read by its last token's logits, and is short enough to be recorded."""
    nothing: tuple[Any, ...] = (None, False, {})
    given = {name for name, value in inputs.items() if isinstance(value, Tensor) or value not in nothing}
    text = model.config.get_text_config()
    mask, embeds = inputs.get("attention_mask"), inputs["inputs_embeds"]
    return (
        given <= _READ | _WITHOUT_EFFECT
        and inputs.get("use_cache") is not False
        and inputs.get("return_dict") is not False
        and inputs.get("logits_to_keep") == 1
        and not cache_length(cache_of(inputs))
        and embeds.shape[0] * embeds.shape[1] <= MOST_TOKENS
        and (mask is None or isinstance(mask, Tensor))
        and getattr(text, "sliding_window", None) is None
        and text._attn_implementation in ("sdpa", "eager")
    )


def _prefill(stock: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of the last token, and keys and values of all layers."""
    output = stock(**tensors, **{CACHE: DynamicCache()}, use_cache=True, logits_to_keep=1)
    layers = enumerate(getattr(output, CACHE).layers)
    parts = {f"{part} {index}": getattr(layer, part) for index, layer in layers for part in ("keys", "values")}
    return {"logits": output.logits, **parts}


__all__ = ["additive_mask", "recorded_prefill"]
