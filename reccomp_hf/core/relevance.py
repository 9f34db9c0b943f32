"""Saliency and text relevance of patches, computed by CLIP's own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .tensors import full_precision, reads_are_free


def class_saliency(class_query: Tensor, keys: Tensor, num_heads: int, heads: str, valid: Tensor) -> Tensor:
    """Attention of the class token to every patch.

    The softmax runs over the class token and the valid patches; the class token's own share is dropped afterwards.

    Args:
        class_query: (B, C).
        keys: (B, N + 1, C), class token first.
        num_heads: H, read when `heads` is `"mean"`.
        heads: `"joint"`: one head of width C, as in the paper's code. `"mean"`: a softmax per head, averaged.
        valid: (B, N) bool.

    Returns:
        (B, N) float32, higher means more salient; 0 where not valid.
    """
    groups = num_heads if heads == "mean" else 1
    batch, length, width = keys.shape
    query = class_query.float().reshape(batch, groups, 1, width // groups)
    split = keys.float().reshape(batch, length, groups, width // groups).transpose(1, 2)  # (B, H, N + 1, C / H)
    split = split.transpose(-1, -2)  # (B, H, C / H, N + 1)
    # A product of a whole batch of heads would copy the keys: on a CPU that takes longer than an image at a time.
    alone = groups > 1 and batch > 1 and reads_are_free(keys)
    products = torch.cat([one @ other for one, other in zip(query, split, strict=True)]) if alone else query @ split
    logits = products.view(batch, groups, length) / (width // groups) ** 0.5  # (B, H, N + 1)
    exists = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1).unsqueeze(1)
    attention = logits.masked_fill(~exists, -torch.inf).softmax(-1)
    return attention.mean(1)[:, 1:]


def class_query_and_keys(block: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's query and all keys of a CLIP block, from its own modules.

    Calling the modules keeps quantised and LoRA-wrapped projections in use and needs no attention weights, so the
    result is the same under eager, sdpa and flash attention.

    Args:
        block: A CLIP encoder layer.
        states: (B, N + 1, C), the block's input.

    Returns:
        (B, C) query and (B, N + 1, C) keys, unscaled.
    """
    normed = block.layer_norm1(states)
    return block.self_attn.q_proj(normed[:, :1]).squeeze(1), block.self_attn.k_proj(normed)


def received_attention(block: Any, states: Tensor, num_heads: int, valid: Tensor | None) -> Tensor:
    """Attention that every patch receives in a CLIP block, averaged over heads and over the tokens that attend.

    Args:
        block: A CLIP encoder layer; its own modules make queries and keys, see `class_query_and_keys`.
        states: (B, N + 1, C), the block's input.
        num_heads: H.
        valid: (B, N) bool, patches that exist; the others neither attend nor receive. `None` means that all do.

    Returns:
        (B, N) float32, the class token's share left out; 0 where not valid.
    """
    normed = block.layer_norm1(states)
    with full_precision(states):
        query, keys = (
            module(normed).float().unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, N + 1, C / H)
            for module in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        logits = query @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
        if valid is None:
            return logits.softmax(-1).mean((1, 2))[:, 1:]
        exists = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
        attention = logits.masked_fill(~exists[:, None, None], -torch.inf).softmax(-1).mean(1)  # (B, N + 1, N + 1)
        share = exists.float() / exists.sum(-1, keepdim=True)
        return (share.unsqueeze(1) @ attention).squeeze(1)[:, 1:]


def relevance_state(kind: str, blocks: int) -> int:
    """Index of the hidden state that `patch_embeddings` reads; the number of blocks means the last block's output."""
    return blocks if kind == "last" else blocks - 1


def patch_embeddings(
    kind: str, states: Tensor, block: Any, post_layernorm: nn.Module, projection: nn.Module
) -> Tensor:
    """Patches in CLIP's joint space.

    Args:
        kind: `"last"`: the last block's output as it is (the paper's code). `"penultimate"`: post_layernorm of the
            last block's input. `"value"`: post_layernorm of the last block's value path alone (MaskCLIP, Zhou et
            al., ECCV 2022), which needs no attention between patches.
        states: (B, N + 1, C), output of the last block for `"last"`, else its input, see `relevance_state`.
        block: The last block.
        post_layernorm: The tower's final norm.
        projection: CLIP's visual projection.

    Returns:
        (B, N, P), class token dropped.
    """
    patches = states[:, 1:]
    if kind == "last":
        return projection(patches)
    if kind == "value":
        patches = block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(patches)))
    return projection(post_layernorm(patches))


def text_similarity(patches: Tensor, text: Tensor, windows: Tensor, sign: int, cosine: bool = True) -> Tensor:
    """Similarity of patches and question; for a long question the best of its windows counts.

    Args:
        patches: (B, N, P) patch embeddings.
        text: (B, W, P) embeddings of the question's windows.
        windows: (B, W) bool, windows that hold text.
        sign: 1 or -1.
        cosine: Whether lengths are divided out; otherwise the products as they are.

    Returns:
        (B, N) float32, higher means more relevant; -inf for an image without text.
    """
    patches, text = patches.float(), text.float()
    if cosine:
        patches, text = normalize(patches, dim=-1), normalize(text, dim=-1)
    products = patches @ text.transpose(1, 2)  # (B, N, W)
    return (sign * products).masked_fill(~windows.unsqueeze(1), -torch.inf).amax(-1)


def word_similarity(words: Tensor, exists: Tensor, patches: Tensor) -> Tensor:
    """Cosines of words and patches in the language model's space.

    Args:
        words: (B, M, D) embeddings of the tokens of a question's words.
        exists: (B, M) bool, tokens that are not padding.
        patches: (B, N, D) projected patches.

    Returns:
        (B, M, N) float32; -inf in the rows of padding.
    """
    words, patches = normalize(words.float(), dim=-1), normalize(patches.float(), dim=-1)
    return (words @ patches.transpose(1, 2)).masked_fill(~exists.unsqueeze(-1), -torch.inf)


__all__ = [
    "class_query_and_keys",
    "class_saliency",
    "patch_embeddings",
    "received_attention",
    "relevance_state",
    "text_similarity",
    "word_similarity",
]
