"""The fields that the models' outputs have in addition to the stock ones."""

from __future__ import annotations

import dataclasses

from torch import LongTensor, Tensor


@dataclasses.dataclass
class CompressedFields:
    """Fields of outputs for the shortened sequence; the counts are `None` if nothing was compressed.

    It stands before a stock output class in the bases, whose fields then come first.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all images in reading order, with LLaVA-NeXT's newlines.
        visual_token_counts: (I,) int64, number of tokens of each image, newlines not counted.
        newline_counts: (I,) int64, number of newline embeddings of each image; 0 for LLaVA-1.5.
    """

    image_hidden_states: Tensor | None = None  # the stock field; 5.24 has a property, which would warn
    visual_token_counts: LongTensor | None = None
    newline_counts: LongTensor | None = None


__all__ = ["CompressedFields"]
