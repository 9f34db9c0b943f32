"""Inputs of a conversation's calls of the model: settings, messages, images, and the options of `generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.configuration import TokenRecoveryConfig
from ..core.features import TokenRecoveryOutput
from ..core.methods.registry import get_method
from ..core.vision import EncodedImages
from .cache import VisualToken

# Settings that keep every token of an image, for a conversation with the uncompressed model.
_ALL_TOKENS = {
    "enabled": True,
    "method": "recoverable",
    "budget": 1.0,
    "text_share": 0.0,
    "coverage_share": 0.0,
    "merged_tokens": 0,
    "position_ids": "compact",
}
_RESERVED_ARGUMENTS = (
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values", "image_sizes"),
    *("recovery_input_ids", "recovery_attention_mask", "recovery_rule", "recovery_words"),
    *("token_recovery", "return_dict_in_generate"),
)
_LENGTH_ARGUMENTS = ("max_length", "min_length")
_ARGUMENTS_WITHOUT_CACHE = (
    *("cache", "past_key_values", "cache_implementation", "use_cache"),
    *("num_beams", "prompt_lookup_num_tokens", "assistant_model"),
)


@dataclasses.dataclass
class TurnInputs:
    """Inputs of a turn.

    Attributes:
        text: The question.
        ids: (1, L) int64, the uncut conversation with the question.
        lengths: Number of placeholders of every image.
        question: The question in tokens: arguments of the model.
        images: Images that come with the question, encoded.
        options: Options of `generate`.
    """

    text: str
    ids: Tensor
    lengths: list[int]
    question: dict[str, Tensor]
    images: EncodedImages | None
    options: dict[str, Any]


@dataclasses.dataclass
class Prefill:
    """Tokens that a turn appends to the cache before its answer.

    Attributes:
        ids: (1, n) int64.
        positions: (1, n) int64.
        embeds: (1, n, D) embeddings, if there are visual tokens among them.
        records: For every image so far, the record of its choice for this question.
        visual: The visual tokens among them.
    """

    ids: Tensor
    positions: Tensor
    embeds: Tensor | None
    records: list[TokenRecoveryOutput]
    visual: list[VisualToken]


def check_options(mode: str, options: Mapping[str, Any], config: Any) -> None:
    """Refuse arguments of `generate` that a conversation sets itself, or that its mode does not support.

    Args:
        mode: Mode of the conversation.
        options: The arguments.
        config: The model's generation config, for options that are not among the arguments.

    Raises:
        ValueError: There is such an argument.
    """
    for name in _RESERVED_ARGUMENTS:
        if name in options:
            raise ValueError(f"ask sets {name} itself: leave it out.")
    for name in _LENGTH_ARGUMENTS:
        if name in options:
            raise ValueError(f"{name} would include the tokens that a turn reads: use {name[:3]}_new_tokens.")
    config = options.get("generation_config") or config
    if options.get("num_return_sequences", getattr(config, "num_return_sequences", None)) not in (None, 1):
        raise ValueError("A question has one answer: leave num_return_sequences out.")
    values = {name: options.get(name, getattr(config, name, None)) for name in _ARGUMENTS_WITHOUT_CACHE}
    unusual = [name for name, value in values.items() if value not in (None, True)]  # 1 beam is True
    if mode != "rebuild" and unusual:
        raise ValueError(
            f"{unusual[0]} does not work with the cache that mode={mode!r} keeps: leave it out, or use mode='rebuild'."
        )


def call_fields(section: TokenRecoveryConfig, mode: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields to override in every call of a conversation."""
    fields = dict(overrides or {}) if section.replace(overrides).enabled else dict(_ALL_TOKENS)
    if mode == "append":
        for settings in section.replace(fields).all_settings:
            if get_method(settings.method).compact_only:
                raise ValueError(
                    f"mode='append' puts tokens at their original positions, but tokens of method {settings.method!r} "
                    "have none: use mode='rebuild' or 'keep'."
                )
        fields["position_ids"] = "original"
    return fields


def chat_message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """A chat message with its images first."""
    return {"role": role, "content": [*([{"type": "image"}] * images), {"type": "text", "text": text}]}


__all__ = ["Prefill", "TurnInputs", "call_fields", "chat_message", "check_options"]
