"""LLaVA-1.5 with token recovery."""

from __future__ import annotations

import dataclasses

from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from .compat import register_key_renames
from .configuration import LlavaRecCompConfig
from .generation import RecCompGenerationMixin
from .modeling import RecCompMixin
from .outputs import CompressedFields


@dataclasses.dataclass
class LlavaRecCompModelOutputWithPast(CompressedFields, LlavaModelOutputWithPast):
    """The stock output for the shortened sequence, see [`CompressedFields`]."""


@dataclasses.dataclass
class LlavaRecCompCausalLMOutputWithPast(CompressedFields, LlavaCausalLMOutputWithPast):
    """The stock output for the shortened sequence, with loss and logits of it, see [`CompressedFields`]."""


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
