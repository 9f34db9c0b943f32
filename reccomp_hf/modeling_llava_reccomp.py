"""LLaVA-1.5 with token recovery."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import LongTensor, Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from . import compat
from .configuration_reccomp import LlavaRecCompConfig
from .generation_reccomp import RecCompGenerationMixin
from .modeling_reccomp import RecCompMixin


@dataclasses.dataclass
class LlavaRecCompModelOutputWithPast(LlavaModelOutputWithPast):
    """Stock outputs of the shortened sequence.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all pictures in reading order.
        visual_token_counts: (I,) int64, tokens that each picture became; `None` where nothing was compressed.
    """

    visual_token_counts: LongTensor | None = None


@dataclasses.dataclass
class LlavaRecCompCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Stock outputs; loss and logits are of the shortened sequence.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all pictures in reading order.
        visual_token_counts: (I,) int64, tokens that each picture became; `None` where nothing was compressed.
    """

    visual_token_counts: LongTensor | None = None


class LlavaRecCompModel(RecCompMixin, LlavaModel):
    """`LlavaModel` (no language-model head) that reads recovered tokens."""

    config_class = LlavaRecCompConfig

    def forward(
        self,
        input_ids: LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        recovery_input_ids: LongTensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlavaModel.forward` on the shortened sequence, see [`RecCompMixin.compress_inputs`]."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        return self._compressed_forward(
            {**inputs, **kwargs}, recovery_input_ids, recovery_attention_mask, token_recovery,
            LlavaRecCompModelOutputWithPast,
        )  # fmt: skip


class LlavaRecCompForConditionalGeneration(RecCompGenerationMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` that reads recovered tokens."""

    config_class = LlavaRecCompConfig

    def forward(
        self,
        input_ids: LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: LongTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        recovery_input_ids: LongTensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock method; with pictures, loss and logits are of the shortened sequence.

        Args:
            input_ids: (R, L) int64; beside `inputs_embeds` and without pictures they are not read.
            pixel_values: (I, 3, H, W) pictures of all rows in reading order.
            attention_mask: (R, L), 0 for padding.
            position_ids: (R, L) int64.
            past_key_values: As in the stock method; empty beside pictures.
            inputs_embeds: As in the stock method.
            labels: (R, L) int64 for the uncut sequence; they are cut with it.
            logits_to_keep: As in the stock method.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            token_recovery: Fields of the config section to override for this call.
            **kwargs: Everything else that the stock method takes.

        Returns:
            A [`LlavaRecCompCausalLMOutputWithPast`].

        Raises:
            ValueError: Inputs that do not fit, see [`RecCompMixin.compress_inputs`].
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        inputs |= {"labels": labels, "logits_to_keep": logits_to_keep}
        return self._compressed_forward(
            {**inputs, **kwargs}, recovery_input_ids, recovery_attention_mask, token_recovery,
            LlavaRecCompCausalLMOutputWithPast,
        )  # fmt: skip


# Here and not in the package's __init__: with trust_remote_code this file alone is imported.
compat.register_key_renames("LlavaRecCompForConditionalGeneration", "llava")
compat.register_key_renames("LlavaRecCompModel", "LlavaModel")

__all__ = ["LlavaRecCompForConditionalGeneration", "LlavaRecCompModel"]
