"""What a model and a call must bring for token recovery; each error says what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .choosing import check_budget
from .compat import CACHE, cache_of
from .configuration import TokenRecoveryConfig
from .methods.registry import get_method


def check_supported(config: Any, section: TokenRecoveryConfig) -> None:
    """Refuse a model that token recovery does not know, and a section that does not fit it."""
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"Token recovery goes by CLIP's class token; the vision tower is {vision.model_type!r}, which is not "
            "supported. Use a LLaVA with a CLIP vision tower ('clip_vision_model')."
        )
    check_feature_layer(config, None, None)
    if -section.visual_layer > vision.num_hidden_layers:
        raise ValueError(
            f"token_recovery.visual_layer is {section.visual_layer}, but the vision tower has only "
            f"{vision.num_hidden_layers} blocks."
        )
    pinpoints = getattr(config, "image_grid_pinpoints", None) or []
    tiles = 1 + max(
        ((height // vision.image_size) * (width // vision.image_size) for height, width in pinpoints), default=0
    )
    check_budget(section, tiles * (vision.image_size // vision.patch_size) ** 2)


def check_feature_layer(config: Any, layer: int | None, strategy: str | None) -> None:
    """Refuse features that come after the last block, from several layers, or with the class token."""
    layer = config.vision_feature_layer if layer is None else layer
    strategy = config.vision_feature_select_strategy if strategy is None else strategy
    blocks = config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -blocks - 1 <= layer <= blocks or layer % (blocks + 1) == blocks:
        raise ValueError(
            f"vision_feature_layer must be one int below the last of the {blocks} blocks (LLaVA's is -2), "
            f"got {layer!r}."
        )
    if strategy != "default":
        raise ValueError(f"vision_feature_select_strategy must be 'default' (no class token), got {strategy!r}.")


def check_question(recovery_input_ids: Tensor | None, rows: int, section: TokenRecoveryConfig) -> None:
    """Refuse a call without a question where the method reads one."""
    if recovery_input_ids is None:
        raise ValueError(
            "Text recovery needs the question: recovery_input_ids is None. The processor of this checkpoint "
            f"writes it (AutoProcessor.from_pretrained); {without_question(section)}"
        )
    if recovery_input_ids.ndim != 3 or recovery_input_ids.shape[0] != rows:
        raise ValueError(
            f"recovery_input_ids must have shape (rows, windows, length) with {rows} rows, got "
            f"{tuple(recovery_input_ids.shape)}."
        )


def without_question(section: TokenRecoveryConfig) -> str:
    """What a call can do that has no question."""
    if get_method(section.method).needs_text:
        return f"method {section.method!r} is undefined without one."
    return "a visual-only call sets token_recovery={'text_share': 0} and a budget."


def check_call(config: Any, section: TokenRecoveryConfig, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs beside which pictures cannot be compressed."""
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None or inputs.get("inputs_embeds") is not None:
        raise ValueError("Pictures need input_ids with their placeholders, and no inputs_embeds beside them.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)} beside pictures, got "
            f"{tuple(attention_mask.shape)}."
        )
    check_encoder_outputs(inputs)
    if past := cache_length(cache_of(inputs)):
        raise ValueError(
            f"Pictures with a non-empty {CACHE}: it holds the shortened prompt, so full-length "
            f"input_ids do not fit it. {_how_to_go_on(past)} A picture that joins later goes through "
            f"reccomp_hf.Conversation, or through compress_inputs without {CACHE}."
        )
    attention = getattr(config.get_text_config(), "_attn_implementation", None) or ""
    if section.position_ids == "original" and attention.startswith("flash"):
        raise ValueError(
            f"position_ids 'original' leaves gaps, which {attention} takes for packed sequences: load the model "
            "with attn_implementation='sdpa' or set position_ids to 'compact'."
        )


def check_encoder_outputs(inputs: Mapping[str, Any]) -> None:
    """Refuse pictures that the stock vision tower and projector have been over."""
    if inputs.get("mm_encoder_outputs"):
        raise ValueError(
            "mm_encoder_outputs hold encoded pictures, which token recovery cannot compress: pass pixel_values or the "
            "result of encode_images, or token_recovery={'enabled': False} to have them read uncompressed."
        )


def cache_length(cache: Any) -> int:
    """Tokens in a cache; `None` is an empty one."""
    return 0 if cache is None else int(cache.get_seq_length())


def goes_on(prompt: Tensor, inputs: Mapping[str, Any], image_token_id: int, section: TokenRecoveryConfig) -> bool:
    """Whether the prompt of a `generate` call is the new part alone of what a non-empty cache already holds.

    The mask decides: (R, cached + new) says that the prompt is new, (R, prompt) that it is the whole sequence, as
    stock `generate` takes it. Without a mask it is the whole sequence.

    Args:
        prompt: (R, L) int64.
        inputs: The call's other arguments, a cache with P > 0 entries among them.
        image_token_id: Of the placeholders.
        section: The settings of the call.

    Raises:
        ValueError: A length that fits neither, placeholders that the cache cannot hold, positions that are missing,
            or an assistant.
    """
    past, length, mask = cache_length(cache_of(inputs)), prompt.shape[1], inputs.get("attention_mask")
    width = length if mask is None else mask.shape[-1]
    if width == length and (length <= past or section.enabled):
        _check_whole_sequence(prompt, past, image_token_id)
    if width == length:
        return False
    if width != past + length:
        raise ValueError(
            f"attention_mask covers {width} tokens, but {CACHE} holds {past} and input_ids {length} more: "
            f"give it the shape (rows, {past + length}) where input_ids are the new ids alone."
        )
    if inputs.get("inputs_embeds") is None and bool((prompt == image_token_id).any()):
        raise ValueError(
            "The new input_ids hold image placeholders without their pictures: a picture that joins later goes "
            "through reccomp_hf.Conversation, or pass what compress_inputs makes of the new part, inputs_embeds "
            "included."
        )
    if section.enabled and section.position_ids == "original" and inputs.get("position_ids") is None:
        raise ValueError(
            "With position_ids 'original' the cache does not tell where the conversation goes on: pass position_ids "
            f"(rows, {length}) that count the uncut sequence, of which the new ids are the end."
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} reads the whole prompt, but {CACHE} holds a part of it: leave it out.")
    return True


def _check_whole_sequence(prompt: Tensor, past: int, image_token_id: int) -> None:
    """Refuse a prompt that cannot be the whole sequence of a cache."""
    if bool((prompt == image_token_id).any()):
        raise ValueError(
            f"input_ids hold image placeholders, but {CACHE} is not empty: it holds the "
            f"shortened prompt, so full-length input_ids do not fit it. {_how_to_go_on(past)}"
        )
    if prompt.shape[1] <= past:
        raise ValueError(
            f"input_ids hold {prompt.shape[1]} ids and {CACHE} already {past}, so they cannot be the whole "
            f"sequence, which they are taken for without a mask of cache and new ids. {_how_to_go_on(past)}"
        )


def _how_to_go_on(past: int) -> str:
    return (
        f"Pass the new ids alone with attention_mask of shape (rows, {past} + new ids), the cache's {past} first; or "
        f"start without {CACHE}."
    )


def is_tiled(config: Any) -> bool:
    """Whether pictures are several tiles with newlines between their rows: LLaVA-NeXT."""
    return getattr(config, "image_grid_pinpoints", None) is not None


__all__ = [
    "cache_length",
    "check_call",
    "check_encoder_outputs",
    "check_feature_layer",
    "check_question",
    "check_supported",
    "goes_on",
    "is_tiled",
    "without_question",
]
