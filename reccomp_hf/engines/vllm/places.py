"""Original positions in vLLM: every token keeps the position that it has in the uncompressed prompt.

vLLM numbers the tokens of a prompt consecutively, unless a model uses M-RoPE, which gives a prompt three rows of
positions. This plug-in reads its positions from the first row, and keeps in the others what they are computed from.
The place of a token, which is the placeholder that it stands for, is known when its image is encoded. It travels from
there in two more channels of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import override

_BASE = 256
"""Integers up to here are exact in bfloat16, whose significand has 8 bits."""
_CHANNELS = 2


def append_places(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens with their places as two more channels: (K, D), (K,) int64 -> (K, D + 2)."""
    digits = torch.stack([places // _BASE, places % _BASE], dim=-1)
    return torch.cat([tokens, digits.to(tokens)], dim=-1)


def split_places(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `append_places`."""
    quotient, remainder = tokens[:, -_CHANNELS:].long().unbind(-1)
    return tokens[:, :-_CHANNELS], quotient * _BASE + remainder


def prompt_positions(length: int, images: Iterable[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Positions of a prompt before its images are encoded.

    Args:
        length: N, number of tokens.
        images: For each image, in order, the index of its first token, its number of tokens, and its number of
            placeholders in the uncompressed prompt.

    Returns:
        (3, N) int64, and the last row's value. The rows are: positions, where tokens of an image have that of the
        image's first placeholder; the position of the first placeholder for tokens of an image, -1 for text; the
        difference between the position of a token after the prompt and its index.
    """
    rows, added = torch.arange(length).repeat(3, 1), 0
    rows[1] = -1
    for start, tokens, placeholders in images:
        rows[:2, start : start + tokens] = start + added
        added += placeholders - tokens
        rows[0, start + tokens :] = torch.arange(start + tokens, length) + added
    rows[2] = added
    return rows, added


def place_tokens(rows: Tensor, tokens: Sequence[Tensor], computed: int) -> tuple[list[Tensor], Tensor, int]:
    """Set the positions of tokens of images, once these are encoded.

    Args:
        rows: (3, N) int64 of `prompt_positions`.
        tokens: (K, D + 2) each, the tokens of images from `computed` on, in order.
        computed: Number of tokens of the prompt whose keys and values exist already.

    Returns:
        The tokens without their places, the new rows, and the last row's value.
    """
    if not len(tokens):
        return [], rows, int(rows[2, 0])
    embeds, places = split_places(torch.cat(list(tokens)))
    at = (rows[1, computed:] >= 0).nonzero()[: len(places), 0] + computed
    rows = rows.clone()
    rows[0, at] = rows[1, at] + places.to(rows.device)
    return list(embeds.split([len(one) for one in tokens])), rows, int(rows[2, 0])


def check_tables(language_model: torch.nn.Module, positions: int) -> None:
    """Check that a model's rotary embeddings have a row for every position; on a GPU a missing row is read silently.

    Raises:
        ValueError: One has fewer.
    """
    tables = [len(table) for name, table in language_model.named_buffers() if name.endswith("cos_sin_cache")]
    if not tables or min(tables) < positions:
        raise ValueError(
            f'token_recovery.position_ids is "original", but the language model {type(language_model).__name__} has '
            f"no rotary embedding of {positions} positions in vLLM: serve with {override(position_ids='compact')}."
        )


__all__ = ["append_places", "check_tables", "place_tokens", "prompt_positions", "split_places"]
