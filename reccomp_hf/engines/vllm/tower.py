"""Adapter giving vLLM's CLIP vision tower the attribute names of transformers'.

vLLM fuses the query, key and value projections of an attention into one layer. The adapter calls the fused layer and
splits its output, so that quantised weights and vLLM's kernels stay in use.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor


class _Attention:
    """vLLM's `CLIPAttention`, with one callable per projection."""

    def __init__(self, attention: Any) -> None:
        self._fused = attention.qkv_proj
        self._out = attention.out_proj
        self.q_proj, self.k_proj, self.v_proj = (self._projection(index) for index in range(3))

    def _projection(self, index: int) -> Callable[[Tensor], Tensor]:
        return lambda states: self._fused(states)[0].chunk(3, dim=-1)[index]

    def out_proj(self, states: Tensor) -> Tensor:
        return self._out(states)[0]


class _Block:
    """vLLM's `CLIPEncoderLayer`, with the signature of transformers'."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.layer_norm1 = layer.layer_norm1
        self.self_attn = _Attention(layer.self_attn)

    def __call__(self, states: Tensor, attention_mask: None) -> Tensor:
        return self._layer(states)


def clip_tower(vision_model: Any) -> Any:
    """Wrap vLLM's `CLIPVisionTransformer` for `vision_states` and `choose_tokens`.

    Args:
        vision_model: The transformer with all its blocks, the last one included.
    """
    return types.SimpleNamespace(
        embeddings=vision_model.embeddings,
        pre_layrnorm=vision_model.pre_layrnorm,
        encoder=types.SimpleNamespace(layers=[_Block(layer) for layer in vision_model.encoder.layers]),
        post_layernorm=vision_model.post_layernorm,
    )


__all__ = ["clip_tower"]
