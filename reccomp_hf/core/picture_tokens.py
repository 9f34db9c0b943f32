"""From a vision tower's hidden states to the tokens that stand for pictures: what the models and the engines share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .choosing import check_features
from .configuration import TokenRecoveryConfig
from .features import TokenRecoveryOutput, TokenSelection, VisualFeatures
from .layout import ImageLayout
from .methods.registry import get_method
from .relevance import class_query_and_keys, patch_embeddings, relevance_state, text_similarity
from .tensors import full_precision, pack_rows
from .vision import EncodedImages


@dataclasses.dataclass
class Question:
    """What is asked about the tiles of a batch. R questions, T tiles.

    Args:
        input_ids: (R, W, L) int64, the questions as the text encoder's tokens, in windows.
        windows: (R, W) bool, windows that hold text.
        rows: (T,) int64, the question of each tile.
    """

    input_ids: Tensor
    windows: Tensor
    rows: Tensor


def window_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(R, W) bool, windows that hold text, of ids and mask (R, W, L); without a mask all do."""
    if attention_mask is None:
        return torch.ones_like(input_ids[..., 0], dtype=torch.bool)
    return (attention_mask != 0).any(-1)


def question_similarity(
    tower: Any, modules: Any, patch_states: Tensor, question: Question, section: TokenRecoveryConfig
) -> Tensor:
    """Similarity of every tile's patches with the question asked about it.

    Args:
        tower: The module that holds `encoder` and `post_layernorm`.
        modules: The [`TokenRecoveryModules`].
        patch_states: (T, N + 1, C), the hidden states that the section's relevance reads.
        question: Questions with R rows.
        section: The settings.

    Returns:
        (T, N) float32, higher means more relevant; -inf for a tile without text.

    Raises:
        ValueError: A visual-only checkpoint.
    """
    if modules is None:
        raise ValueError("This checkpoint is visual-only: token_recovery.text_encoder_config is null.")
    projection = modules.visual_projection
    with record_function("reccomp::text_encoder"):
        text = modules.embed_question(question.input_ids)
    rows = question.rows.to(patch_states.device)
    with record_function("reccomp::relevance"):
        patches = patch_embeddings(
            section.text_relevance, patch_states, tower.encoder.layers[-1], tower.post_layernorm, projection
        )
        text = text.to(patches.device)
        with full_precision(patches):
            windows = question.windows.to(rows.device)[rows]
            similarity = text_similarity(patches, text[rows], windows, section.text_relevance_sign)
    scale = projection.out_features**0.5 if get_method(section.method).scales_similarity else 1
    return similarity / scale


def visual_features(
    tower: Any,
    modules: Any,
    encoded: EncodedImages,
    question: Question | None,
    section: TokenRecoveryConfig,
    feature_layer: int,
    *,
    num_heads: int,
    projector: Callable[[Tensor], Tensor],
) -> VisualFeatures:
    """What the method looks at, out of a CLIP vision tower's own modules; nothing is read from the device.

    Args:
        tower: The module that holds `encoder` and `post_layernorm`.
        modules: The [`TokenRecoveryModules`], `None` in a visual-only model.
        encoded: The pictures, with the hidden states that the section needs.
        question: `None` where the choice does not read it.
        section: The settings.
        feature_layer: The hidden state that LLaVA's projector reads.
        num_heads: Attention heads of the tower.
        projector: LLaVA's projector, called here only for a method that reads projected features.

    Raises:
        ValueError: Shapes or settings that do not fit.
    """
    states, blocks = encoded.states, len(tower.encoder.layers)
    hidden_states = states[feature_layer % (blocks + 1)][:, 1:]
    # The parts of a model may be on several devices: the choice is made where the chosen features are.
    device, projected = hidden_states.device, None
    with torch.no_grad():
        block = section.visual_layer % blocks
        query, keys = class_query_and_keys(tower.encoder.layers[block], states[block])
        similarity = None
        if question is not None:
            patch_states = states[relevance_state(section.text_relevance, blocks)]
            similarity = question_similarity(tower, modules, patch_states, question, section).to(device)
        if get_method(section.method).reads_projected:
            with record_function("reccomp::projector"):
                projected = projector(hidden_states).to(device)
    return check_features(
        hidden_states,
        query.to(device),
        keys.to(device),
        similarity,
        section,
        num_heads=num_heads,
        grid=encoded.grid,
        valid=encoded.layout.valid,
        tiles=encoded.layout.tiles,
        projected=projected,
    )


def projected_tokens(
    projector: Callable[[Tensor], Tensor],
    newline: Tensor | None,
    layout: ImageLayout,
    selection: TokenSelection,
    record: TokenRecoveryOutput,
    lengths: Tensor,
    *,
    sizes: list[int],
    longest: int,
    total: int,
) -> tuple[Tensor, Tensor]:
    """The language model's tokens of all pictures, in the order of the prompt.

    Args:
        projector: LLaVA's projector; it reads kept and merged tokens only.
        newline: (D,), the embedding at a row's end, where the layout has any.
        layout: Of the pictures, I of them.
        selection: The choice.
        record: What it came to.
        lengths: (I,) int64, tokens of each picture, newlines included.
        sizes: Of the selection, as read.
        longest: The largest of `lengths`.
        total: Their sum.

    Returns:
        (total, D) tokens, and (I, longest) int64, the placeholder that each stands for.
    """
    features = projector(pack_rows(record.tokens, record.counts, sizes[2]))
    if newline is not None:
        features = torch.cat([features, newline.to(features).unsqueeze(0)])
    order, places = layout.sequence(selection, record, sizes, longest)
    return features[pack_rows(order, lengths.to(order.device), total).to(features.device)], places


__all__ = ["Question", "projected_tokens", "question_similarity", "visual_features", "window_mask"]
