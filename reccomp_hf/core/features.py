"""The data that methods read and return: features, selection, merged tokens, and the record of a choice."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from .relevance import class_saliency


@dataclasses.dataclass
class TokenRecoveryOutput:
    """Which tokens stand for each image, and where every patch went. B images, N patches, K tokens at most.

    For LLaVA-NeXT a row is a tile, and an image's tiles are consecutive rows.

    Args:
        tokens: (B, K, C), the kept patches in raster order, then the merged tokens; right-padded with zeros.
        counts: (B,) int64, tokens of each image.
        visual_mask: (B, N) bool, patches kept for their saliency; by `random` and `base_tile`, all that are kept; and
            by most methods all patches of a tile whose budget is that large.
        text_mask: (B, N) bool, patches recovered for the question.
        coverage_mask: (B, N) bool, patches kept to cover the image: spread evenly, or unlike each other.
        centre_mask: (B, N) bool, patches around which the rest was merged; of a pooled cell the first patch, of all
            that was dropped the most salient one.
        cluster: (B, N) int64, index in `tokens` that a patch went into; -1 where it was dropped, or went into several.
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

    def stage_counts(self) -> dict[str, int]:
        """Tokens of all rows by stage: `visual`, `text`, `coverage` and `merged`. Reads from the device."""
        kept = {name: int(getattr(self, f"{name}_mask").sum()) for name in ("visual", "text", "coverage")}
        return {**kept, "merged": int(self.counts.sum()) - sum(kept.values())}

    def split(self, tiles: list[int]) -> list[TokenRecoveryOutput]:
        """One output per image, of as many rows as the image has tiles. Reads the counts from the device."""
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


@dataclasses.dataclass
class VisualFeatures:
    """What a method may look at. B images, N patches of width C, class token apart.

    Args:
        hidden_states: (B, N, C), what LLaVA's projector reads.
        class_query: (B, C), the class token's query.
        keys: (B, N + 1, C), class token first.
        text_similarity: (B, N) or `None`; higher means more relevant to the question.
        num_heads: Attention heads of the vision tower.
        grid: (rows, columns) of the patches in raster order.
        valid: (B, N) bool, patches that exist.
        all_valid: Whether `valid` is known, without looking at the device, to be all true.
        tiles: Consecutive rows that each image has; all 1 but for LLaVA-NeXT.
        projected: (B, N, D), what LLaVA's projector makes of `hidden_states`, for a method that `reads_projected`;
            else perhaps `None`.
    """

    hidden_states: Tensor
    class_query: Tensor
    keys: Tensor
    text_similarity: Tensor | None
    num_heads: int
    grid: tuple[int, int]
    valid: Tensor
    all_valid: bool
    tiles: list[int]
    projected: Tensor | None = None

    def saliency(self, heads: str) -> Tensor:
        """(B, N) float32 attention of the class token, see [`class_saliency`]."""
        return class_saliency(self.class_query, self.keys, self.num_heads, heads, self.valid)

    def per_image(self, values: Tensor, fill: float) -> Tensor:
        """Scores of an image's tiles side by side, `fill` where it has fewer: (B, N, ...) -> (I, S * N, ...)."""
        images, slots = len(self.tiles), max(self.tiles)
        if slots == 1:
            return values
        grouped = values.new_full((images * slots, *values.shape[1:]), fill)
        return grouped.index_copy(0, self._rows, values).view(images, -1, *values.shape[2:])

    def per_tile(self, values: Tensor) -> Tensor:
        """The inverse of `per_image`: (I, S * X) -> (B, X)."""
        images, slots = len(self.tiles), max(self.tiles)
        return values if slots == 1 else values.view(images * slots, -1)[self._rows]

    @functools.cached_property
    def _rows(self) -> Tensor:
        """(B,) int64, where each tile stands among the images' slots."""
        slots = max(self.tiles)
        rows = [image * slots + tile for image, size in enumerate(self.tiles) for tile in range(size)]
        return torch.tensor(rows).to(self.valid.device, non_blocking=True)


@dataclasses.dataclass
class TokenSelection:
    """A method's choice, still on the device: masks (B, N), and how many merged tokens follow the kept ones.

    `known_sizes` holds the values of `sizes` where they follow from a fixed budget; `None` means they must be read.
    `extra_mask` marks, among the centres, the place of a token that is not made around it, for the method's own merge.
    """

    visual_mask: Tensor
    text_mask: Tensor
    coverage_mask: Tensor
    centre_mask: Tensor
    merged_counts: Tensor
    saliency: Tensor
    known_sizes: list[int] | None = None
    extra_mask: Tensor | None = None

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
        """(3,) int64 on the device: the largest count, the largest number of merged tokens, all tokens together."""
        counts = self.counts
        return torch.stack([counts.max(), self.merged_counts.max(), counts.sum()])


@dataclasses.dataclass
class MergedTokens:
    """What a method made of the patches that were not kept. M merged tokens at most.

    Args:
        tokens: (B, M, C); rows with fewer merged tokens are padded.
        places: (B, M) int64, raster index a merged token stands at, -1 without one.
        cluster: (B, N) int64, merged token that a patch went into, -1 for none.
    """

    tokens: Tensor
    places: Tensor
    cluster: Tensor


__all__ = ["MergedTokens", "TokenRecoveryOutput", "TokenSelection", "VisualFeatures"]
