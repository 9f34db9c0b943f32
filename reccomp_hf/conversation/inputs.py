"""What a conversation hands to the model: settings, messages, pictures, and what a call may say besides."""

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

# Every token of a picture, for a conversation with the uncompressed model.
_WHOLE = {
    "enabled": True,
    "method": "recoverable",
    "budget": 1.0,
    "text_share": 0.0,
    "coverage_share": 0.0,
    "merged_tokens": 0,
    "position_ids": "compact",
}
_OURS = (
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values", "image_sizes"),
    *("recovery_input_ids", "recovery_attention_mask", "token_recovery", "return_dict_in_generate"),
)
_LENGTHS = ("max_length", "min_length")
_NOT_BEHIND_A_CACHE = (
    *("cache", "past_key_values", "cache_implementation", "use_cache"),
    *("num_beams", "prompt_lookup_num_tokens", "assistant_model"),
)


@dataclasses.dataclass
class Asked:
    """A question as the model is to read it: the uncut conversation (1, L), its pictures' lengths, CLIP's question."""

    text: str
    ids: Tensor
    lengths: list[int]
    question: dict[str, Tensor]
    new: EncodedImages | None
    options: dict[str, Any]


@dataclasses.dataclass
class Part:
    """What goes behind the cache: ids and positions (1, n), and embeddings (1, n, D) where visual tokens are in it."""

    ids: Tensor
    positions: Tensor
    embeds: Tensor | None
    records: list[TokenRecoveryOutput]
    visual: list[VisualToken]


def check_options(mode: str, options: Mapping[str, Any], config: Any) -> None:
    """Refuse arguments of `generate` that a conversation makes itself, or that do not go with its mode.

    Args:
        mode: Of the conversation.
        options: The arguments.
        config: The model's generation config, for what they do not say.

    Raises:
        ValueError: There is one.
    """
    for name in _OURS:
        if name in options:
            raise ValueError(f"ask makes {name} itself: leave it out.")
    for name in _LENGTHS:
        if name in options:
            raise ValueError(f"{name} would count what a turn reads: write {name[:3]}_new_tokens.")
    config = options.get("generation_config") or config
    if options.get("num_return_sequences", getattr(config, "num_return_sequences", None)) not in (None, 1):
        raise ValueError("A question has one answer: leave num_return_sequences out.")
    set_here = {name: options.get(name, getattr(config, name, None)) for name in _NOT_BEHIND_A_CACHE}
    unusual = [name for name, value in set_here.items() if value not in (None, True)]  # 1 beam is True
    if mode != "rebuild" and unusual:
        raise ValueError(
            f"{unusual[0]} does not go with the cache that mode={mode!r} keeps: leave it out, or use mode='rebuild'."
        )


def call_fields(section: TokenRecoveryConfig, mode: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields to override in every call of a conversation."""
    fields = dict(overrides or {}) if section.replace(overrides).enabled else dict(_WHOLE)
    if mode == "append":
        method = section.replace(fields).method
        if get_method(method).compact_only:
            raise ValueError(
                f"mode='append' puts tokens at their original positions, which method {method!r} does not have: use "
                "mode='rebuild' or 'keep'."
            )
        fields["position_ids"] = "original"
    return fields


def chat_message(role: str, text: str, pictures: int = 0) -> dict[str, Any]:
    """A chat message with its pictures first."""
    return {"role": role, "content": [*([{"type": "image"}] * pictures), {"type": "text", "text": text}]}


__all__ = ["Asked", "Part", "call_fields", "chat_message", "check_options"]
