"""Checks of models and calls for token recovery; each error says what to do about it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.utils import logging

from .choosing import check_budget
from .compat import CACHE, cache_of
from .configuration import TokenRecoveryConfig
from .methods.registry import get_method, reads_encoded_question, reads_words
from .settings import is_int, shown
from .tensor_checks import check_ids, check_known_ids, check_mask

logger = logging.get_logger(__name__)

NO_QUESTION = "Text recovery needs the question: recovery_input_ids is None."
NO_WORDS = "Text recovery needs the question's words: recovery_words is None."
_WITHOUT_VIRTUAL_TOKENS = (
    "with images use another adapter, such as LoRA, or token_recovery={'enabled': False} to read them uncompressed."
)


def check_supported(config: Any, section: TokenRecoveryConfig) -> None:
    """Refuse a model that token recovery does not support, and a section that does not fit it.

    With `enabled: false` nothing is refused: the stock model runs.

    Raises:
        ValueError: The vision tower, the feature layer, or the section.
    """
    if not section.enabled:
        return
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"Token recovery needs CLIP's class token; the vision tower is {vision.model_type!r}, which is not "
            "supported. Use a LLaVA with a CLIP vision tower ('clip_vision_model')."
        )
    check_feature_layer(config, None, None)
    if not is_int(vision.patch_size) or not 0 < vision.patch_size <= vision.image_size:
        raise ValueError(
            f"vision_config.patch_size must be an int from 1 to image_size {vision.image_size}, got "
            f"{shown(vision.patch_size)}: restore the config.json of the checkpoint."
        )
    patches = most_tiles(config) * (vision.image_size // vision.patch_size) ** 2
    for rule, settings in enumerate(section.all_settings, start=-1):
        name = "token_recovery" if rule < 0 else f"token_recovery.rules[{rule}]"
        if -settings.visual_layer > vision.num_hidden_layers:
            raise ValueError(
                f"{name}.visual_layer is {settings.visual_layer}, but the vision tower has only "
                f"{vision.num_hidden_layers} blocks."
            )
        check_budget(settings, patches, name)


def check_feature_layer(config: Any, layer: int | None, strategy: str | None) -> None:
    """Refuse features of the last block's output, of several layers, or with the class token."""
    layer = config.vision_feature_layer if layer is None else layer
    strategy = config.vision_feature_select_strategy if strategy is None else strategy
    blocks = config.vision_config.num_hidden_layers
    if not is_int(layer) or not -blocks - 1 <= layer <= blocks or layer % (blocks + 1) == blocks:
        raise ValueError(
            f"vision_feature_layer must be one int below the last of the {blocks} blocks (LLaVA's is -2), "
            f"got {layer!r}."
        )
    if strategy != "default":
        raise ValueError(f"vision_feature_select_strategy must be 'default' (no class token), got {strategy!r}.")


def check_question(
    recovery_input_ids: Tensor | None,
    recovery_attention_mask: Tensor | None,
    recovery_words: Tensor | None,
    rows: int,
    section: TokenRecoveryConfig,
) -> None:
    """Refuse a call without a question if the method reads one, and a question that does not fit the call."""
    if reads_words(section):
        if recovery_words is None:
            raise ValueError(
                f"{NO_WORDS} The processor of this checkpoint writes them (AutoProcessor.from_pretrained, with the "
                f"code of this version of reccomp_hf); {no_question_hint(section)}"
            )
        check_ids("recovery_words", recovery_words, 2)
        if recovery_words.shape[0] != rows:
            raise ValueError(
                f"recovery_words must have shape (rows, tokens) with {rows} rows, got {tuple(recovery_words.shape)}."
            )
    if recovery_input_ids is None:
        if not reads_encoded_question(section):
            return
        raise ValueError(
            f"{NO_QUESTION} The processor of this checkpoint writes it (AutoProcessor.from_pretrained); "
            f"{no_question_hint(section)}"
        )
    check_ids("recovery_input_ids", recovery_input_ids, None)
    shape = recovery_input_ids.shape
    if len(shape) != 3 or shape[0] != rows or 0 in shape[1:]:
        raise ValueError(
            f"recovery_input_ids must have shape (rows, windows, length) with {rows} rows, got {tuple(shape)}; none "
            "of them may be 0."
        )
    positions = (section.text_encoder_config or {}).get("max_position_embeddings", 77)
    if shape[-1] > positions:
        raise ValueError(
            f"recovery_input_ids must have windows of at most {positions} tokens, the text encoder's positions, got "
            f"{shape[-1]}: use the processor of this checkpoint, which splits a long question."
        )
    check_mask("recovery_attention_mask", recovery_attention_mask, "recovery_input_ids", shape)


def check_finite(non_finite: list[int], tiles: list[int]) -> None:
    """Refuse images whose features are NaN or infinite.

    Args:
        non_finite: 1 for each tile with such features.
        tiles: Number of tiles of each image.
    """
    if any(non_finite):
        images = [image for image, size in enumerate(tiles) for _ in range(size)]
        raise ValueError(
            f"The vision tower's features of image {images[non_finite.index(1)]} hold NaN or infinity: check its "
            "pixel_values, which must be finite, and whether the model's dtype can hold them."
        )


def no_question_hint(section: TokenRecoveryConfig) -> str:
    """The end of an error message: how to call the model without a question."""
    if get_method(section.method).text == "required":
        return f"method {section.method!r} is undefined without one."
    return "a visual-only call sets token_recovery={'text_share': 0} and a budget."


def check_call(config: Any, section: TokenRecoveryConfig, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs with which images cannot be compressed."""
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None or inputs.get("inputs_embeds") is not None:
        raise ValueError(
            "Images need input_ids with their placeholders, and no inputs_embeds, which PEFT's prompt tuning passes: "
            f"{_WITHOUT_VIRTUAL_TOKENS}"
        )
    if past := cache_length(cache_of(inputs)):
        raise ValueError(
            f"Images with a non-empty {CACHE}: it holds the shortened prompt, so full-length "
            f"input_ids do not fit it. {_continuation_hint(past)} To add an image later, use "
            f"reccomp_hf.Conversation, or compress_inputs without {CACHE}. PEFT's prefix tuning passes such a cache: "
            f"{_WITHOUT_VIRTUAL_TOKENS}"
        )
    check_ids("input_ids", input_ids, 2)
    vocabulary = config.get_text_config().vocab_size
    check_known_ids("input_ids", input_ids, vocabulary)
    check_mask("attention_mask", attention_mask, "input_ids", input_ids.shape)
    if (position_ids := inputs.get("position_ids")) is not None:
        check_ids("position_ids", position_ids, 2)
        if position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            raise ValueError(
                f"position_ids must have the shape of input_ids {tuple(input_ids.shape)} with images, or its columns "
                f"in one row, got {tuple(position_ids.shape)}."
            )
    check_encoder_outputs(inputs)
    check_labels(inputs, vocabulary)
    attention = getattr(config.get_text_config(), "_attn_implementation", None) or ""
    if section.position_ids == "original" and attention.startswith("flash"):
        raise ValueError(
            f"position_ids 'original' leaves gaps, which {attention} treats as packed sequences: load the model "
            "with attn_implementation='sdpa' or set position_ids to 'compact'."
        )


def check_labels(inputs: Mapping[str, Any], vocabulary: int) -> None:
    """Refuse labels that do not fit the prompts, and a training step whose labels do not reach the model."""
    for name in ("labels", "shift_labels"):
        if (labels := inputs.get(name)) is None:
            continue
        check_ids(name, labels, None)
        if labels.shape != inputs["input_ids"].shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(inputs['input_ids'].shape)} with images, got "
                f"{tuple(labels.shape)}: they are cut along with the prompts."
            )
        check_known_ids(name, labels, vocabulary, inputs.get("ignore_index", -100))
    if inputs.get("num_items_in_batch") is not None and inputs.get("labels") is None:
        raise ValueError(
            "num_items_in_batch without labels: with label_smoothing_factor or compute_loss_func the Trainer keeps "
            "the labels, which do not fit the logits of the shortened sequence. Put the mixin in front, class "
            "MyTrainer(reccomp_hf.CompressedTrainerMixin, Trainer), or leave both out; a loop of your own takes the "
            "cut labels from model.compress_inputs(**inputs)."
        )


def check_encoder_outputs(inputs: Mapping[str, Any]) -> None:
    """Refuse images that the stock vision tower and projector have encoded."""
    if inputs.get("mm_encoder_outputs"):
        raise ValueError(
            "mm_encoder_outputs hold encoded images, which token recovery cannot compress: pass pixel_values or the "
            "result of encode_images, or token_recovery={'enabled': False} to read them uncompressed."
        )


def check_reads_embeddings(prepare: Any) -> None:
    """Refuse to generate about images where `prepare_inputs_for_generation` was replaced by one without embeddings."""
    parameters = inspect.signature(prepare).parameters
    if "inputs_embeds" not in parameters:
        raise ValueError(
            "prepare_inputs_for_generation was replaced by one that reads the prompt as ids, as PEFT's prompt and "
            f"prefix tuning do, and a compressed prompt is passed as embeddings: {_WITHOUT_VIRTUAL_TOKENS}"
        )


def check_logits_to_keep(logits_to_keep: Any) -> int:
    """The number of last logits that a call with images asks for, 0 for all; refuses indices."""
    if logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep >= 0):
        return logits_to_keep or 0
    raise ValueError(
        f"logits_to_keep must be a number of last tokens with images, got {logits_to_keep!r}: indices would name "
        "places of the shortened sequence. Pass the number, or index the logits of compress_inputs' result."
    )


def check_no_cut_logits(dropped: int) -> None:
    """Refuse a `logits_to_keep` that reaches placeholders that were cut: the logits would be those of other places."""
    if dropped:
        raise ValueError(
            f"logits_to_keep reaches {dropped} image placeholders that were cut, so the logits would not be those of "
            "the last tokens as they were passed: pass a number that ends behind the images, or 0 for all logits of "
            "the shortened sequence."
        )


def note_empty_answers(new_ids: Tensor, ends: int | list[int] | None) -> None:
    """Log a hint, once per process, where the model has ended every answer with its first token.

    Args:
        new_ids: (R, M) int64 generated ids; they are read from the device only if M is 1.
        ends: Ids that end an answer.
    """
    ends = [ends] if isinstance(ends, int) else ends or []
    if new_ids.shape[1] == 1 and all(end in ends for end in new_ids[:, 0].tolist()):
        logger.warning_once(
            "The answer is empty: its first token ends it. If the prompt is text of your own, write it with the turns "
            "that the model was trained on: processor.apply_chat_template(messages, add_generation_prompt=True), or "
            "for LLaVA-1.5 'USER: <image>\\nQuestion? ASSISTANT:'."
        )


def cache_length(cache: Any) -> int:
    """Number of tokens in a cache; `None` counts as empty.

    Raises:
        ValueError: It is not a cache.
    """
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ValueError(f"{CACHE} must be a cache of transformers, such as DynamicCache(), got {shown(cache)}.")
    return 0 if cache is None else int(cache.get_seq_length())


def is_continuation(prompt: Tensor, inputs: Mapping[str, Any]) -> bool:
    """Whether the prompt of a `generate` call with a non-empty cache holds the new ids alone.

    The mask decides: (R, cached + new) means that the prompt is new, (R, prompt) that it is the whole sequence, as
    stock `generate` takes it. Without a mask it is the whole sequence.

    Args:
        prompt: (R, L) int64.
        inputs: The call's other arguments.
    """
    mask = inputs.get("attention_mask")
    return mask is not None and mask.shape[-1] != prompt.shape[1]


def check_continuation(
    prompt: Tensor, inputs: Mapping[str, Any], image_token_id: int, section: TokenRecoveryConfig
) -> None:
    """Refuse a `generate` call with a non-empty cache whose prompt does not fit the cache.

    Args:
        prompt: (R, L) int64, the whole sequence or the new ids alone, see [`is_continuation`].
        inputs: The call's other arguments, among them a cache with P > 0 entries.
        image_token_id: The placeholder's id.
        section: The settings of the call.

    Raises:
        ValueError: A length that fits neither, placeholders that the cache cannot hold, missing positions, or an
            assistant.
    """
    past, length = cache_length(cache_of(inputs)), prompt.shape[1]
    if not is_continuation(prompt, inputs):
        if length <= past or section.enabled:
            _check_whole_sequence(prompt, past, image_token_id)
        return
    if (width := inputs["attention_mask"].shape[-1]) != past + length:
        raise ValueError(
            f"attention_mask covers {width} tokens, but {CACHE} holds {past} and input_ids {length} more: "
            f"give it the shape (rows, {past + length}) if input_ids are the new ids alone."
        )
    if inputs.get("inputs_embeds") is None and bool((prompt == image_token_id).any()):
        raise ValueError(
            "The new input_ids hold image placeholders without their images: to add an image later, use "
            "reccomp_hf.Conversation, or pass the result of compress_inputs for the new part, inputs_embeds included."
        )
    if section.enabled and section.position_ids == "original" and inputs.get("position_ids") is None:
        raise ValueError(
            "With position_ids 'original' the cache does not say where the conversation continues: pass position_ids "
            f"(rows, {length}) that count the uncut sequence, of which the new ids are the end."
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} reads the whole prompt, but {CACHE} holds a part of it: leave it out.")


def _check_whole_sequence(prompt: Tensor, past: int, image_token_id: int) -> None:
    """Refuse a prompt that cannot be the whole sequence that a cache begins."""
    if bool((prompt == image_token_id).any()):
        raise ValueError(
            f"input_ids hold image placeholders, but {CACHE} is not empty: it holds the "
            f"shortened prompt, so full-length input_ids do not fit it. {_continuation_hint(past)}"
        )
    if prompt.shape[1] <= past:
        raise ValueError(
            f"input_ids hold {prompt.shape[1]} ids and {CACHE} already {past}, so they cannot be the whole "
            f"sequence; without a mask that covers cache and new ids they are read as that. {_continuation_hint(past)}"
        )


def _continuation_hint(past: int) -> str:
    return (
        f"Pass the new ids alone with attention_mask of shape (rows, {past} + new ids), the cache's {past} first; or "
        f"start without {CACHE}."
    )


def most_tiles(config: Any) -> int:
    """Tiles of the largest image: 1 for LLaVA-1.5."""
    side, pinpoints = config.vision_config.image_size, getattr(config, "image_grid_pinpoints", None) or []
    return 1 + max(((height // side) * (width // side) for height, width in pinpoints), default=0)


def is_tiled(config: Any) -> bool:
    """Whether images are cut into tiles with newlines between their rows, as in LLaVA-NeXT."""
    return getattr(config, "image_grid_pinpoints", None) is not None


__all__ = [
    "NO_QUESTION",
    "cache_length",
    "check_call",
    "check_continuation",
    "check_encoder_outputs",
    "check_feature_layer",
    "check_finite",
    "check_labels",
    "check_logits_to_keep",
    "check_no_cut_logits",
    "check_question",
    "check_reads_embeddings",
    "check_supported",
    "is_continuation",
    "is_tiled",
    "most_tiles",
    "no_question_hint",
    "note_empty_answers",
]
