"""From a vision tower's hidden states to the tokens that stand for images: the step that models and engines share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .choosing import assemble_tokens, check_features, select_tokens
from .configuration import TokenRecoveryConfig
from .features import Sizes, TokenRecoveryOutput, TokenSelection, VisualFeatures
from .layout import ImageLayout
from .methods.registry import get_method
from .relevance import class_query_and_keys, patch_embeddings, received_attention, text_similarity, word_similarity
from .tensors import full_precision, pack_rows
from .vision import EncodedImages, check_states, needed_states, state_indices
from .words import NO_WORD


@dataclasses.dataclass
class Question:
    """The questions about the tiles of a batch. R questions, T tiles.

    Args:
        input_ids: (R, W, L) int64, the questions as the text encoder's tokens, in windows; `None` if it reads none.
        windows: (R, W) bool, windows that hold text; `None` without them.
        rows: (T,) int64, the question of each tile.
        words: (R, M) int64, the questions' words as LLaVA's tokens, -1 for padding; `None` if none are read.
        text_of_window: (R, W) int64, the text of each window, if `input_ids` are texts (texts, 1, L) that occur once.
    """

    input_ids: Tensor | None
    windows: Tensor | None
    rows: Tensor
    words: Tensor | None = None
    text_of_window: Tensor | None = None


@dataclasses.dataclass
class Choice:
    """The tokens chosen for the images of a batch. I images, T tiles.

    Nothing is read from the device until `read` or `sync`; `record` and `tokens` need the sizes.

    Args:
        features: The features that the choice was made from.
        selection: The method's choice.
        layout: The placeholders of the images.
        section: The settings.
        token_counts: (I,) int64, tokens of each image, newlines not counted.
        newline_counts: (I,) int64, newlines of each image.
        sizes: The sizes of the selection, once known.
        longest_image: Tokens of the longest image, newlines included, once known.
        image_lengths: Tokens of each image, newlines included, once known.
    """

    features: VisualFeatures
    selection: TokenSelection
    layout: ImageLayout
    section: TokenRecoveryConfig
    token_counts: Tensor
    newline_counts: Tensor
    sizes: Sizes = dataclasses.field(init=False)
    longest_image: int = dataclasses.field(init=False)
    image_lengths: list[int] | None = None

    @property
    def lengths(self) -> Tensor:
        """(I,) int64, tokens of each image, newlines included."""
        return self.token_counts + self.newline_counts

    @property
    def non_finite(self) -> Tensor:
        """(T,) int64, 1 for each tile whose features hold NaN or infinity."""
        return (~self.features.hidden_states.isfinite().flatten(1).all(1)).long()

    @property
    def unread(self) -> list[Tensor]:
        """The numbers, as 1-D tensors, whose values `read` takes; none if a fixed budget says them."""
        if isinstance(self.selection.known_sizes, Sizes):
            return []
        return [self.selection.sizes, self.lengths]

    def read(self, values: list[int]) -> None:
        """Set the sizes from the values of `unread`, one tensor after the other."""
        known = self.selection.known_sizes
        if isinstance(known, Sizes):  # without newlines, and every tile is an image
            self.sizes, self.image_lengths = known, [known.longest] * len(self.layout.tiles)
        else:
            self.sizes, self.image_lengths = Sizes(*values[:3]), values[3:]
        self.longest_image = max(self.image_lengths)

    def sync(self) -> None:
        """Read the sizes from the device, if they are not known."""
        self.read(torch.cat(self.unread).tolist() if self.unread else [])

    def fix_sizes(self, most_newlines: int | None = None) -> bool:
        """Set sizes that need no read: known ones, or bounds, with padding where the choice has fewer tokens.

        Args:
            most_newlines: Bound of an image's newlines; `None` takes no bounds.

        Returns:
            Whether the sizes are set.
        """
        known = self.selection.known_sizes
        if isinstance(known, Sizes):
            self.sync()
        elif known is None or most_newlines is None:
            return False
        else:
            self.sizes = Sizes(known.longest, known.most_merged, known.total)
            self.longest_image = known.longest_image + most_newlines
        return True

    def record(self) -> TokenRecoveryOutput:
        """The record of the choice, one row per tile; merges what was not kept."""
        return assemble_tokens(self.features, self.selection, self.section, self.sizes)

    def records(self) -> list[TokenRecoveryOutput]:
        """The record of each image."""
        return self.record().split(self.layout.tiles)

    def tokens(self, projector: Callable[[Tensor], Tensor], newline: Tensor | None) -> PictureTokens:
        """Merge what was not kept, and project the language model's tokens of all images.

        Args:
            projector: LLaVA's projector; it reads kept and merged tokens only.
            newline: (D,), the embedding at a row's end; `None` if the layout has no newlines.
        """
        with record_function("reccomp::merge"):
            record = self.record()
        with record_function("reccomp::projector"):
            exact = self.image_lengths is not None
            features = projector(pack_rows(record.tokens, record.counts, self.sizes.total, exact))
            if newline is not None:
                features = torch.cat([features, newline.to(features).unsqueeze(0)])
            leading = self.selection.leading_counts
            order, places = self.layout.sequence(record, self.sizes, self.longest_image, leading)
            features = features[order.to(features.device)]
        counts = (self.token_counts, self.newline_counts)
        return PictureTokens(features, places, *counts, self.non_finite, record, self.image_lengths)


@dataclasses.dataclass
class PictureTokens:
    """The language model's tokens of the images of a batch. I images, K tokens at most, T tiles.

    Args:
        features: (I, K, D), the tokens in the order of the prompt, padded on the right.
        places: (I, K) int64, the placeholder that each token stands for.
        token_counts: (I,) int64, tokens of each image, newlines not counted.
        newline_counts: (I,) int64, newlines of each image.
        non_finite: (T,) int64, 1 for each tile whose features hold NaN or infinity.
        record: Where every patch went.
        image_lengths: Tokens of each image, newlines included; `None` until read.
    """

    features: Tensor
    places: Tensor
    token_counts: Tensor
    newline_counts: Tensor
    non_finite: Tensor
    record: TokenRecoveryOutput
    image_lengths: list[int] | None

    @property
    def lengths(self) -> Tensor:
        """(I,) int64, tokens of each image, newlines included."""
        return self.token_counts + self.newline_counts

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        record = {f"record {name}": value for name, value in vars(self.record).items() if value is not None}
        return own | record

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], image_lengths: list[int] | None) -> PictureTokens:
        """The inverse of `tensors`."""
        fields = {field.name: tensors.get(f"record {field.name}") for field in dataclasses.fields(TokenRecoveryOutput)}
        own = {name: value for name, value in tensors.items() if not name.startswith("record ")}
        return cls(**own, record=TokenRecoveryOutput(**fields), image_lengths=image_lengths)  # type: ignore[arg-type]

    @property
    def unread(self) -> list[Tensor]:
        """The numbers, as 1-D tensors, whose values `read` takes."""
        return [self.lengths] if self.image_lengths is None else []

    def read(self, values: list[int]) -> None:
        """Set the numbers of tokens from the values of `unread`."""
        self.image_lengths = values or self.image_lengths

    def packed(self) -> Tensor:
        """The tokens of all images, one image after the other: (tokens, D)."""
        assert self.image_lengths is not None
        return pack_rows(self.features, self.lengths.to(self.features.device), sum(self.image_lengths))


def window_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(R, W) bool, windows that hold text, of ids and mask (R, W, L); all of them without a mask."""
    if attention_mask is None:
        return torch.ones_like(input_ids[..., 0], dtype=torch.bool)
    return (attention_mask != 0).any(-1)


def text_pooling(section: TokenRecoveryConfig) -> str:
    """Where a section's method pools a text: `"end"` or `"last"`."""
    return getattr(section.options, "pooling", "end")


def choose_tokens(
    tower: Any,
    modules: Any,
    encoded: EncodedImages,
    question: Question | None,
    section: TokenRecoveryConfig,
    feature_layer: int,
    *,
    num_heads: int,
    projector: Callable[[Tensor], Tensor],
    embedding: Callable[[Tensor], Tensor],
) -> Choice:
    """Choose the tokens of encoded images by the modules of a CLIP vision tower; nothing is read from the device.

    Args:
        tower: The module that holds `encoder` and `post_layernorm`.
        modules: The [`TokenRecoveryModules`], `None` in a visual-only model.
        encoded: The images, with the hidden states that the section reads.
        question: `None` if the choice does not read it.
        section: The settings.
        feature_layer: The hidden state that LLaVA's projector reads.
        num_heads: Number of attention heads of the tower.
        projector: LLaVA's projector, called here only for a method that reads projected features.
        embedding: The language model's input embeddings, called here only for a method that reads words.

    Raises:
        ValueError: Shapes or settings that do not fit.
    """
    blocks = len(tower.encoder.layers)
    check_states(encoded.states, needed_states(section, feature_layer, blocks, question is not None))
    device = encoded.states[state_indices(section, feature_layer, blocks).projector].device
    layout = encoded.layout.to(device).with_newlines(section.newlines)
    encoded = dataclasses.replace(encoded, layout=layout)
    features = visual_features(
        tower,
        modules,
        encoded,
        question,
        section,
        feature_layer,
        num_heads=num_heads,
        projector=projector,
        embedding=embedding,
    )
    with record_function("reccomp::select"):
        selection = select_tokens(features, section)
    counts = layout.counts(selection.kept_mask, selection.merged_counts)
    return Choice(features, selection, layout, section, *counts)


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
    embedding: Callable[[Tensor], Tensor],
) -> VisualFeatures:
    """The features that the method reads; arguments as in [`choose_tokens`]."""
    states, indices = encoded.states, state_indices(section, feature_layer, len(tower.encoder.layers))
    hidden_states = states[indices.projector][:, 1:]
    # The parts of a model may be on several devices: the choice is made on the device of the chosen features.
    device, similarity, words, projected, received = hidden_states.device, None, None, None, None
    method, blocks = get_method(section.method), tower.encoder.layers
    with torch.no_grad():
        query, keys = class_query_and_keys(blocks[indices.saliency], states[indices.saliency])
        if question is not None and not method.reads_words:
            similarity = question_similarity(tower, modules, states[indices.relevance], question, section).to(device)
        if method.reads_projected:
            with record_function("reccomp::projector"):
                projected = projector(hidden_states).to(device)
        if question is not None and method.reads_words:
            assert projected is not None
            words = similarity_of_words(question, projected, embedding)
        if method.object_block is not None:
            received = torch.stack(
                [
                    received_attention(blocks[index], states[index], num_heads, encoded.layout.valid).to(device)
                    for index in (indices.objects, indices.saliency)
                ],
                dim=1,
            )
    features = VisualFeatures(
        hidden_states,
        query.to(device),
        keys.to(device),
        similarity,
        num_heads=num_heads,
        grid=encoded.grid,
        valid=encoded.layout.valid,  # type: ignore[arg-type]  # None means that all are
        tiles=encoded.layout.tiles,
        projected=projected,
        received=received,
        class_state=states[indices.projector][:, 0] if method.reads_class_token else None,
        word_similarity=words,
    )
    check_features(features, section)
    return features


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
    assert question.input_ids is not None
    assert question.windows is not None
    projection = modules.visual_projection
    with record_function("reccomp::text_encoder"):
        text = modules.embed_question(question.input_ids, text_pooling(section))
        if question.text_of_window is not None:
            text = text.squeeze(1)[question.text_of_window.to(text.device)]
    rows = question.rows.to(patch_states.device)
    with record_function("reccomp::relevance"):
        patches = patch_embeddings(
            section.text_relevance, patch_states, tower.encoder.layers[-1], tower.post_layernorm, projection
        )
        text = text.to(patches.device)
        with full_precision(patches):
            windows = question.windows.to(rows.device)[rows]
            cosine = getattr(section.options, "similarity", "cosine") == "cosine"
            similarity = text_similarity(patches, text[rows], windows, section.text_relevance_sign, cosine)
    scale = projection.out_features**0.5 if get_method(section.method).scales_similarity else 1
    return similarity / scale


def similarity_of_words(question: Question, projected: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
    """Cosines of every tile's projected patches (T, N, D) with the words of the question asked about it.

    Args:
        question: Questions with M tokens of words.
        projected: The projected patches.
        embedding: The language model's input embeddings.

    Returns:
        (T, M, N) float32; -inf in the rows of padding.
    """
    assert question.words is not None
    with record_function("reccomp::words"):
        words = embedding(question.words.clamp(min=0)).to(projected.device)
        rows = question.rows.to(projected.device)
        exists = (question.words != NO_WORD).to(projected.device)
        with full_precision(projected):
            return word_similarity(words[rows], exists[rows], projected)


__all__ = [
    "Choice",
    "PictureTokens",
    "Question",
    "choose_tokens",
    "question_similarity",
    "similarity_of_words",
    "text_pooling",
    "visual_features",
    "window_mask",
]
