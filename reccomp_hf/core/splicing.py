"""Cutting a batch of prompts down to the kept tokens: ids, masks, labels, positions.

Everything runs on the device; the few numbers that shapes depend on are stacked into one tensor, so that a prefill
reads the device once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class PlaceholderMap:
    """The places of every image's placeholders. R rows of L tokens, I images.

    Args:
        is_placeholder: (R, L) bool.
        image: (R, L) int64, the image whose placeholder a slot is (any valid index elsewhere).
        offset: (R, L) int64, which of its image's placeholders a slot is.
        row: (I,) int64, the row an image stands in.
        per_row: (R,) int64, placeholders of each row.
    """

    is_placeholder: Tensor
    image: Tensor
    offset: Tensor
    row: Tensor
    per_row: Tensor


def map_placeholders(is_placeholder: Tensor, lengths: Tensor) -> PlaceholderMap:
    """Assign placeholders to images in reading order.

    Args:
        is_placeholder: (R, L) bool.
        lengths: (I,) int64, placeholders that each image has, I > 0.

    Returns:
        A [`PlaceholderMap`]; meaningful once `check_placeholders` found that the counts fit.
    """
    ends = lengths.cumsum(0)
    ordinal = is_placeholder.flatten().cumsum(0).view_as(is_placeholder) - 1
    ordinal = ordinal.clamp(min=0)
    last = lengths.shape[0] - 1
    image = torch.searchsorted(ends, ordinal, right=True).clamp(max=last)
    per_row = is_placeholder.sum(-1)
    row = torch.searchsorted(per_row.cumsum(0), ends - lengths, right=True).clamp(max=per_row.shape[0] - 1)
    return PlaceholderMap(is_placeholder, image, ordinal - (ends - lengths)[image], row, per_row)


def check_placeholders(per_row: list[int], lengths: list[int]) -> None:
    """Refuse prompts whose placeholders do not fit the images.

    Args:
        per_row: Placeholders of each row.
        lengths: Placeholders that each image needs.

    Raises:
        ValueError: Other totals, or a row that holds a part of an image.
    """
    if sum(per_row) != sum(lengths):
        raise ValueError(
            f"Image placeholders and images do not match: the prompts hold {sum(per_row)} image placeholder tokens, "
            f"{len(lengths)} image(s) need {sum(lengths)}. Put one image token per image into the prompt and let "
            "the processor expand it, without a max_length that cuts it off."
        )
    starts, total = {0}, 0
    for length in lengths:
        total += length
        starts.add(total)
    total = 0
    for index, count in enumerate(per_row):
        total += count
        if total not in starts:
            raise ValueError(
                f"Row {index} holds {count} image placeholder tokens, which is not a whole number of images "
                f"(an image needs {lengths[0]}). Let the processor expand the image token."
            )


@dataclasses.dataclass
class Splice:
    """The slots of the uncut sequence that stay, and their new places.

    Args:
        keeps: (R, L) bool, slots that stay.
        drops: (R, L) bool, placeholders that go.
        new_lengths: (R,) int64, tokens of each row after the cut.
        sizes: (3,) int64 on the device: longest row before and after the cut, right padding that stays included, and
            the number of dropped slots among the last `logits_to_keep`.
        left: () bool, whether rows are filled up on the left.
        right_padding: (R,) int64, padding that each row keeps on the right where rows are filled up on the left.
    """

    keeps: Tensor
    drops: Tensor
    new_lengths: Tensor
    sizes: Tensor
    left: Tensor
    right_padding: Tensor

    def source(self, width: int) -> Tensor:
        """(R, width) int64: the slot of the uncut sequence that each new slot holds, -1 for padding."""
        rows, length = self.keeps.shape
        shift = torch.where(self.left, width - self.new_lengths - self.right_padding, 0).unsqueeze(-1)
        column = torch.where(self.keeps, self.keeps.cumsum(-1) - 1 + shift, width)
        slots = torch.arange(length, device=column.device).expand(rows, -1)
        return slots.new_full((rows, width + 1), -1).scatter_(1, column, slots)[:, :width]


def plan_splice(
    placeholders: PlaceholderMap,
    attention_mask: Tensor,
    counts: Tensor,
    logits_to_keep: int = 0,
    *,
    keeps_last_columns: bool = True,
) -> Splice:
    """Keep the first `counts[i]` placeholders of image i and everything that is neither placeholder nor padding.

    Rows are filled up on the left, as generation needs it, and each keeps its right padding: the last columns stay
    the last columns. Rows that lose different numbers of placeholders can be aligned at one end only. Where nobody
    reads columns, a batch that is padded on the right alone is filled up there and is as short as its longest row.

    Args:
        placeholders: From `map_placeholders`.
        attention_mask: (R, L), 0 for padding.
        counts: (I,) int64, tokens of each image after compression.
        logits_to_keep: Number of last columns that the caller reads, 0 for all.
        keeps_last_columns: Whether the caller reads columns of the result.
    """
    attended = attention_mask != 0
    before = attended.cumsum(-1) == 0
    after = attended.flip(-1).cumsum(-1).flip(-1) == 0
    inside = ~(before | after)
    drops = placeholders.is_placeholder & (placeholders.offset >= counts[placeholders.image])
    keeps = inside & ~drops
    drops = drops & inside
    new_lengths = keeps.sum(-1)
    left = before.any() | ~after.any() | (keeps_last_columns or logits_to_keep > 0)
    right_padding = torch.where(left, (after & ~before).sum(-1), 0)
    lengths = [(inside.sum(-1) + right_padding).max(), (new_lengths + right_padding).max()]
    sizes = torch.stack([*lengths, drops[:, -logits_to_keep:].sum() if logits_to_keep else drops.new_zeros(()).long()])
    return Splice(keeps, drops, new_lengths, sizes, left, right_padding)


def padding_id(input_ids: Tensor, splice: Splice, default: int) -> Tensor:
    """() int64: the id that pads the given prompts, `default` if none is padded."""
    highest = input_ids.masked_fill(splice.keeps | splice.drops, -1).amax()
    return torch.where(highest < 0, default, highest)


def pad_token_id(config: Any) -> int:
    """The id of padding that a model's config names, 0 without one."""
    for holder in (config, config.get_text_config()):
        if getattr(holder, "pad_token_id", None) is not None:
            return holder.pad_token_id
    return 0


def counted_positions(attention_mask: Tensor) -> Tensor:
    """Positions that count the attended tokens of a row, as a stock `generate` does. (R, L) -> (R, L) int64."""
    return ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)


def cut(values: Tensor, source: Tensor, fill: int | Tensor) -> Tensor:
    """Take (R, L) values to the new slots (R, W); padding is `fill`."""
    return torch.where(source < 0, fill, values.gather(1, source.clamp(min=0)))


def cut_shifted(values: Tensor, splice: Splice, source: Tensor) -> Tensor:
    """Take labels (R, L) of the token behind each slot to the new slots (R, W), -100 without one.

    Behind the last kept token of an image stands what stood behind its dropped ones. Padding before a row's first
    token keeps that token's label.
    """
    inside = splice.keeps | splice.drops
    slots = torch.arange(inside.shape[1], device=source.device)
    last = torch.where(inside, slots, 0).amax(-1, keepdim=True)
    following = torch.nn.functional.pad(source[:, 1:], (0, 1), value=-1)
    before = torch.where(following < 0, torch.where(source < 0, -1, last), following - 1)
    return cut(values, before, -100)


def compact_positions(position_ids: Tensor, splice: Splice, source: Tensor) -> Tensor:
    """Given positions without gaps where placeholders were dropped. (R, L) -> (R, W)."""
    return cut(position_ids - splice.drops.cumsum(-1), source, 0)


def original_positions(
    position_ids: Tensor | None, placeholders: PlaceholderMap, places: Tensor, source: Tensor
) -> Tensor:
    """Positions in the uncut sequence: each token keeps its own, an image token that of its patch.

    Args:
        position_ids: (R, L) positions of the uncut sequence, `None` to count the slots as a stock `forward` does.
        placeholders: From `map_placeholders`.
        places: (I, K) int64, raster index of the patch that each image token stands for.
        source: (R, W), from `Splice.source`.

    Returns:
        (R, W) int64; padding counts its slots.
    """
    if position_ids is None:
        position_ids = torch.arange(placeholders.offset.shape[1], device=source.device)
    offset = placeholders.offset.clamp(max=max(places.shape[1] - 1, 0))
    moved = places[placeholders.image, offset] - placeholders.offset if places.shape[1] else offset
    moved = torch.where(placeholders.is_placeholder, moved, 0)
    slots = torch.arange(source.shape[1], device=source.device)
    return torch.where(source < 0, slots, cut(position_ids.expand_as(moved) + moved, source, 0))


__all__ = [
    "PlaceholderMap",
    "Splice",
    "check_placeholders",
    "compact_positions",
    "counted_positions",
    "cut",
    "cut_shifted",
    "map_placeholders",
    "original_positions",
    "pad_token_id",
    "padding_id",
    "plan_splice",
]
