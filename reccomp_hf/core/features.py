"""The data that methods read and return: features, selection, merged tokens, and the record of a choice."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .relevance import class_saliency
from .tensors import constant


@dataclasses.dataclass
class TokenRecoveryOutput:
    """The tokens that stand for each image, and where every patch went. B images, N patches, K tokens at most.

    For LLaVA-NeXT a row is a tile, and an image's tiles are consecutive rows.

    Args:
        tokens: (B, K, C), the kept patches in raster order, then the merged tokens; right-padded with zeros. The
            class token, which `visionzip` keeps, stands first and counts as a merged token.
        counts: (B,) int64, number of tokens of each image.
        visual_mask: (B, N) bool, patches kept for their saliency; for `random` and `base_tile` all that are kept; and
            for most methods all patches of a tile whose budget is that large.
        text_mask: (B, N) bool, patches recovered for the question.
        coverage_mask: (B, N) bool, patches kept to cover the image: spread evenly, or unlike each other.
        centre_mask: (B, N) bool, patches around which the rest was merged; for a pooled cell its first patch, for the
            mean of all dropped patches the most salient one.
        cluster: (B, N) int64, index in `tokens` that a patch went into; -1 if it was dropped, or went into several.
        places: (B, K) int64, raster index of the patch that a token stands for (the centre of a merged one); -1 for
            padding and for a token that has no place.
        saliency: (B, N) float32, class attention; higher means more salient.
        text_similarity: (B, N) float32, or `None` without a question; higher means more relevant.
    """

    tokens: Tensor
    counts: Tensor
    visual_mask: Tensor
    text_mask: Tensor
    coverage_mask: Tensor
    centre_mask: Tensor
    cluster: Tensor
    places: Tensor
    saliency: Tensor
    text_similarity: Tensor | None

    @property
    def kept_mask(self) -> Tensor:
        """(B, N) bool, patches that enter the sequence as they are."""
        return self.visual_mask | self.text_mask | self.coverage_mask

    @property
    def merged_counts(self) -> Tensor:
        """(B,) int64, number of merged tokens."""
        return self.counts - self.kept_mask.sum(-1)

    def stage_counts(self) -> dict[str, int]:
        """Tokens of all rows by stage: `visual`, `text`, `coverage` and `merged`. Reads from the device."""
        kept = {name: int(getattr(self, f"{name}_mask").sum()) for name in ("visual", "text", "coverage")}
        return {**kept, "merged": int(self.counts.sum()) - sum(kept.values())}

    def split(self, tiles: list[int]) -> list[TokenRecoveryOutput]:
        """One output per image, with as many rows as the image has tiles. Reads the counts from the device."""
        counts, start, outputs = self.counts.tolist(), 0, []
        for size in tiles:
            rows, width = slice(start, start + size), max(counts[start : start + size])
            fields: dict[str, Any] = {
                field.name: None if (value := getattr(self, field.name)) is None else value[rows]
                for field in dataclasses.fields(self)
            }
            fields["tokens"], fields["places"] = self.tokens[rows, :width], self.places[rows, :width]
            outputs.append(TokenRecoveryOutput(**fields))
            start += size
        return outputs


class Sizes(NamedTuple):
    """The numbers of tokens that shapes depend on.

    Args:
        longest: Tokens of the row that has most.
        most_merged: Merged tokens of the row that has most of them.
        total: Tokens of all rows together.
    """

    longest: int
    most_merged: int
    total: int


class Bounds(NamedTuple):
    """Numbers that the sizes of a choice never exceed, whatever the images show.

    Args:
        longest: Tokens of a row.
        most_merged: Merged tokens of a row.
        total: Tokens of all rows together.
        longest_image: Tokens of an image, newlines not counted.
    """

    longest: int
    most_merged: int
    total: int
    longest_image: int


@dataclasses.dataclass
class VisualFeatures:
    """The features that a method may read. B images (tiles for LLaVA-NeXT), N patches of width C.

    Built by the models for every batch. Where they are left out, `grid` is a square, all patches are valid, and every
    row is an image of its own.

    Args:
        hidden_states: (B, N, C), the patches as LLaVA's projector reads them, without the class token.
        class_query: (B, C), the class token's query.
        keys: (B, N + 1, C), class token first.
        text_similarity: (B, N) or `None`; higher means more relevant to the question.
        num_heads: Attention heads of the vision tower.
        grid: (rows, columns) of the patches in raster order.
        valid: (B, N) bool, patches that exist.
        tiles: Number of consecutive rows that each image has; all 1 except for LLaVA-NeXT.
        projected: (B, N, D), `hidden_states` after LLaVA's projector; computed for a method that `reads_projected`,
            otherwise it may be `None`.
        received: (B, 2, N) float32, the attention that patches receive in the method's `object_block` and in that of
            `visual_layer`, see [`received_attention`]; computed for a method with an `object_block`, otherwise it may
            be `None`.
        class_state: (B, C), the class token as LLaVA's projector would read it; given to a method that
            `reads_class_token`, otherwise it may be `None`.
        word_similarity: (B, M, N), cosines of the question's words, as the language model embeds their tokens, with
            the projected patches, -inf in the rows of padding; given to a method that `reads_words`, otherwise it
            may be `None`.

    Raises:
        ValueError: Shapes that do not fit each other.
    """

    hidden_states: Tensor
    class_query: Tensor
    keys: Tensor
    text_similarity: Tensor | None = None
    num_heads: int = 1
    grid: tuple[int, int] = None  # type: ignore[assignment]  # completed below
    valid: Tensor = None  # type: ignore[assignment]
    tiles: list[int] = None  # type: ignore[assignment]
    projected: Tensor | None = None
    received: Tensor | None = None
    class_state: Tensor | None = None
    word_similarity: Tensor | None = None

    all_valid: bool = dataclasses.field(init=False)
    """Whether `valid` is known, without reading the device, to be all true."""

    def __post_init__(self) -> None:
        """Check the shapes and complete what was left out; nothing is read from the device."""
        if self.hidden_states.ndim != 3 or self.hidden_states.shape[1] == 0:
            received = tuple(self.hidden_states.shape)
            raise ValueError(f"hidden_states must have shape (B, N, C) with N > 0, got {received}.")
        batch, patches, width = self.hidden_states.shape
        self._check_shapes(batch, patches, width)
        if self.num_heads < 1 or width % self.num_heads:
            raise ValueError(f"num_heads must divide the width {width}, got {self.num_heads}.")
        self.tiles = [1] * batch if self.tiles is None else self.tiles
        if sum(self.tiles) != batch:
            raise ValueError(f"tiles must add up to the {batch} rows of hidden_states, got {self.tiles}.")
        side = math.isqrt(patches)
        if self.grid is None:
            self.grid = (side, side) if side * side == patches else (1, patches)
        elif self.grid[0] * self.grid[1] != patches:
            cells = self.grid[0] * self.grid[1]
            raise ValueError(f"grid {tuple(self.grid)} has {cells} cells, but there are {patches} patches.")
        self.all_valid = self.valid is None
        if self.valid is None:
            self.valid = self.keys.new_ones((batch, patches), dtype=torch.bool)
        # The choice has no gradient.
        self.class_query, self.keys = self.class_query.detach(), self.keys.detach()
        self.text_similarity = None if self.text_similarity is None else self.text_similarity.detach().float()
        self.projected = None if self.projected is None else self.projected.detach()
        self.word_similarity = None if self.word_similarity is None else self.word_similarity.detach().float()
        self.received = None if self.received is None else self.received.detach()

    def _check_shapes(self, batch: int, patches: int, width: int) -> None:
        for name, tensor, needed in (
            ("class_query", self.class_query, (batch, width)),
            ("keys", self.keys, (batch, patches + 1, width)),
            ("text_similarity", self.text_similarity, (batch, patches)),
            ("valid", self.valid, (batch, patches)),
            ("received", self.received, (batch, 2, patches)),
            ("class_state", self.class_state, (batch, width)),
        ):
            if tensor is not None and tuple(tensor.shape) != needed:
                states = tuple(self.hidden_states.shape)
                hint = "; keys start with the class token." if name == "keys" else "."
                raise ValueError(
                    f"{name} must have shape {needed} for hidden_states of shape {states}, "
                    f"got {tuple(tensor.shape)}{hint}"
                )
        words = self.word_similarity
        if words is not None and (words.ndim != 3 or (words.shape[0], words.shape[2]) != (batch, patches)):
            raise ValueError(f"word_similarity must have shape ({batch}, M, {patches}), got {tuple(words.shape)}.")
        projected = self.projected
        if projected is not None and (projected.ndim != 3 or tuple(projected.shape[:2]) != (batch, patches)):
            raise ValueError(f"projected must have shape ({batch}, {patches}, D), got {tuple(projected.shape)}.")

    @property
    def uniform(self) -> bool:
        """Whether every image is one row of valid patches, so that a fixed budget fixes all sizes."""
        return self.all_valid and max(self.tiles) == 1

    def saliency(self, heads: str = "joint") -> Tensor:
        """(B, N) float32 attention of the class token, see [`class_saliency`]; higher means more salient."""
        return class_saliency(self.class_query, self.keys, self.num_heads, heads, self.valid)

    def keep(
        self,
        *,
        visual: Tensor | None = None,
        text: Tensor | None = None,
        coverage: Tensor | None = None,
        centres: Tensor | None = None,
        merged_counts: Tensor | None = None,
        saliency: Tensor | None = None,
        known_sizes: Sizes | Bounds | None = None,
        extra: Tensor | None = None,
        leading_counts: Tensor | None = None,
    ) -> TokenSelection:
        """The selection of a method that keeps these patches; a mask that is left out is empty.

        Args:
            visual: (B, N) bool, patches kept for their saliency.
            text: (B, N) bool, patches kept for the question.
            coverage: (B, N) bool, patches kept to cover the image.
            centres: (B, N) bool, patches around which merged tokens are made.
            merged_counts: (B,) int64, number of merged tokens; by default none.
            saliency: (B, N) float32, shown in the record; by default the class attention of one joint head.
            known_sizes: The selection's sizes, or bounds of them, if they follow from a fixed budget; `None` means
                they must be read.
            extra: (B, N) bool, see [`TokenSelection`].
            leading_counts: (B,) int64, see [`TokenSelection`].
        """
        empty = torch.zeros_like(self.valid)
        visual, text, coverage, centres = (
            empty if mask is None else mask for mask in (visual, text, coverage, centres)
        )
        merged_counts = empty.sum(-1) if merged_counts is None else merged_counts
        saliency = self.saliency() if saliency is None else saliency
        return TokenSelection(
            visual,
            text,
            coverage,
            centres,
            merged_counts,
            saliency,
            known_sizes,
            extra,
            leading_counts,
        )

    def per_image(self, values: Tensor, fill: float) -> Tensor:
        """Scores of an image's tiles in one row, `fill` where it has fewer tiles: (B, N, ...) -> (I, S * N, ...)."""
        images, slots = len(self.tiles), max(self.tiles)
        if slots == 1:
            return values
        grouped = values.new_full((images * slots, *values.shape[1:]), fill)
        return grouped.index_copy(0, self._rows, values).view(images, -1, *values.shape[2:])

    def per_tile(self, values: Tensor) -> Tensor:
        """The inverse of `per_image`: (I, S * X) -> (B, X)."""
        images, slots = len(self.tiles), max(self.tiles)
        return values if slots == 1 else values.view(images * slots, -1)[self._rows]

    @property
    def _rows(self) -> Tensor:
        """(B,) int64, the slot of each tile among the slots of all images."""
        slots = max(self.tiles)
        rows = (image * slots + tile for image, size in enumerate(self.tiles) for tile in range(size))
        return constant(self.valid, tuple, tuple(rows))


@dataclasses.dataclass
class TokenSelection:
    """A method's choice, still on the device: masks (B, N), and the number of merged tokens.

    [`VisualFeatures.keep`] makes one. `known_sizes` holds the values of `sizes` if they follow from a fixed budget, or
    `Bounds` of them where only the device knows how many patches are valid; `None` means that they must be read.
    `extra_mask` marks, among the centres, the place of a token that is not made around it, for the method's own merge.
    `leading_counts` (B,) is the number of merged tokens that stand before the kept ones; `None` means that none do.
    """

    visual_mask: Tensor
    text_mask: Tensor
    coverage_mask: Tensor
    centre_mask: Tensor
    merged_counts: Tensor
    saliency: Tensor
    known_sizes: Sizes | Bounds | None = None
    extra_mask: Tensor | None = None
    leading_counts: Tensor | None = None

    def __post_init__(self) -> None:
        """Accept three ints as sizes."""
        if not isinstance(self.known_sizes, Sizes | Bounds | None):
            self.known_sizes = Sizes(*self.known_sizes)

    @property
    def kept_mask(self) -> Tensor:
        """(B, N) bool, patches that enter the sequence as they are."""
        return self.visual_mask | self.text_mask | self.coverage_mask

    @property
    def counts(self) -> Tensor:
        """(B,) int64, kept and merged tokens of each image."""
        return self.kept_mask.sum(-1) + self.merged_counts

    @property
    def sizes(self) -> Tensor:
        """(3,) int64 on the device, the values of a [`Sizes`]."""
        counts = self.counts
        return torch.stack([counts.max(), self.merged_counts.max(), counts.sum()])

    def read_sizes(self) -> Sizes:
        """The sizes: known ones, or those read from the device."""
        return self.known_sizes if isinstance(self.known_sizes, Sizes) else Sizes(*self.sizes.tolist())


@dataclasses.dataclass
class MergedTokens:
    """The tokens that a method made of the patches it did not keep. M merged tokens at most.

    Args:
        tokens: (B, M, C); rows with fewer merged tokens are padded.
        places: (B, M) int64, raster index that a merged token stands at, -1 without one.
        cluster: (B, N) int64, merged token that a patch went into, -1 for none.
    """

    tokens: Tensor
    places: Tensor
    cluster: Tensor


__all__ = ["Bounds", "MergedTokens", "Sizes", "TokenRecoveryOutput", "TokenSelection", "VisualFeatures"]
