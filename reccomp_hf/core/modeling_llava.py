"""LLaVA-1.5 with token recovery."""

from __future__ import annotations

import dataclasses

from torch import LongTensor, Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from .compat import register_key_renames
from .configuration import LlavaRecCompConfig
from .generation import RecCompGenerationMixin
from .modeling import RecCompMixin


@dataclasses.dataclass
class LlavaRecCompModelOutputWithPast(LlavaModelOutputWithPast):
    """Stock outputs of the shortened sequence; the counts are `None` where nothing was compressed.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all pictures in reading order.
        visual_token_counts: (I,) int64, tokens that each picture became.
        newline_counts: (I,) int64, newline embeddings among its tokens, not counted above; 0 for LLaVA-1.5.
    """

    image_hidden_states: Tensor | None = None  # the stock field; 5.24 has a property, which would warn
    visual_token_counts: LongTensor | None = None
    newline_counts: LongTensor | None = None


@dataclasses.dataclass
class LlavaRecCompCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Stock outputs; loss and logits are of the shortened sequence. Counts are `None` where nothing was compressed.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all pictures in reading order.
        visual_token_counts: (I,) int64, tokens that each picture became.
        newline_counts: (I,) int64, newline embeddings among its tokens, not counted above; 0 for LLaVA-1.5.
    """

    image_hidden_states: Tensor | None = None  # the stock field; 5.24 has a property, which would warn
    visual_token_counts: LongTensor | None = None
    newline_counts: LongTensor | None = None


class LlavaRecCompModel(RecCompMixin, LlavaModel):
    """`LlavaModel` (no language-model head) that reads recovered tokens."""

    config_class = LlavaRecCompConfig
    output_class = LlavaRecCompModelOutputWithPast
    _keys_to_ignore_on_load_unexpected = ["lm_head"]


class LlavaRecCompForConditionalGeneration(RecCompGenerationMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` that reads recovered tokens."""

    config_class = LlavaRecCompConfig
    output_class = LlavaRecCompCausalLMOutputWithPast


# Here and not in the package's __init__: with trust_remote_code this file alone is imported.
register_key_renames("LlavaRecCompForConditionalGeneration", "llava")
register_key_renames("LlavaRecCompModel", "LlavaModel")

__all__ = ["LlavaRecCompForConditionalGeneration", "LlavaRecCompModel"]
