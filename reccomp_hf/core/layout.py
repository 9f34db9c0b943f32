"""The patch that each placeholder of a prompt stands for, and the placeholders that remain after the choice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import Sizes, TokenRecoveryOutput
from .tensors import constant

NEWLINE, PADDING = -1, -2


@dataclasses.dataclass
class ImageLayout:
    """The placeholders of every image. I images of L placeholders at most, T tiles of N patches.

    Args:
        slots: (I, L) int64, the patch that a placeholder stands for, counted over all tiles (tile * N + patch);
            `NEWLINE` for the embedding at a row's end, `PADDING` after an image's last placeholder.
        rows: (I, L) int64, the row of the image that a placeholder belongs to.
        tiles: Number of tiles of each image; they are consecutive.
        lengths: Number of placeholders of each image.
        patches: N.
        patch_counts: Number of patches of each image that have a placeholder.
        has_newlines: Whether rows of the image may end in a newline embedding.
        keeps_newlines: Whether a row that keeps a patch keeps its newline; otherwise no row does.
    """

    slots: Tensor
    rows: Tensor
    tiles: list[int]
    lengths: list[int]
    patches: int
    patch_counts: list[int]
    has_newlines: bool
    keeps_newlines: bool = True

    @classmethod
    def of_grids(cls, images: int, patches: int, like: Tensor | None = None) -> ImageLayout:
        """The layout of images that are one tile each, with patches in raster order, on the device of `like`."""
        like = torch.empty(0) if like is None else like
        slots, lengths = constant(like, _raster_slots, images, patches), [patches] * images
        return cls(slots, torch.zeros_like(slots), [1] * images, lengths, patches, lengths, has_newlines=False)

    @classmethod
    def of_packed(cls, packed: list[Tensor], tiles: list[int], patches: int) -> ImageLayout:
        """The layout that follows from the order in which stock LLaVA-NeXT packs an image.

        Args:
            packed: For each image (length,) int64, the patch counted over the image's own tiles, or `NEWLINE`.
            tiles: Number of tiles of each image, the base tile first.
            patches: Number of patches of a tile.
        """
        lengths, start, slots, rows = [len(order) for order in packed], 0, [], []
        for order, size in zip(packed, tiles, strict=True):
            newline = order == NEWLINE
            row = newline.cumsum(0) - newline.long()
            if size > 1:  # the base tile has no newline: it is a row of its own and comes first
                row = row + (torch.arange(len(order)) >= patches)
            slots.append(torch.where(newline, NEWLINE, order + start * patches))
            rows.append(row)
            start += size
        padded = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True, padding_value=PADDING)
        padded_rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        patch_counts = [int((order != NEWLINE).sum()) for order in packed]
        return cls(padded, padded_rows, list(tiles), lengths, patches, patch_counts, has_newlines=True)

    def to(self, device: torch.device) -> ImageLayout:
        """The layout on another device."""
        slots, rows = (index.to(device, non_blocking=True) for index in (self.slots, self.rows))
        return dataclasses.replace(self, slots=slots, rows=rows)

    def padded(self, length: int) -> ImageLayout:
        """The layout with room for `length` placeholders an image, at least as many as it has."""
        padding = (0, length - self.slots.shape[1])
        slots = torch.nn.functional.pad(self.slots, padding, value=PADDING)
        return dataclasses.replace(self, slots=slots, rows=torch.nn.functional.pad(self.rows, padding))

    def take(self, images: Sequence[int]) -> ImageLayout:
        """The layout of some of the images alone, in the given order."""
        if not self.has_newlines:
            return ImageLayout.of_grids(len(images), self.patches, self.slots)
        starts = [0, *itertools.accumulate(self.tiles)]
        tiles, lengths, counts = (
            [values[image] for image in images] for values in (self.tiles, self.lengths, self.patch_counts)
        )
        ends = itertools.accumulate(tiles)
        moves = [end - size - starts[image] for image, size, end in zip(images, tiles, ends, strict=True)]
        index, moved = torch.tensor([list(images), moves]).to(self.slots.device)
        slots, rows = (part[index, : max(lengths)] for part in (self.slots, self.rows))
        slots = torch.where(slots < 0, slots, slots + moved.unsqueeze(-1) * self.patches)
        return dataclasses.replace(self, slots=slots, rows=rows, tiles=tiles, lengths=lengths, patch_counts=counts)

    def with_newlines(self, newlines: str) -> ImageLayout:
        """The layout with a section's `newlines`."""
        return dataclasses.replace(self, keeps_newlines=newlines == "kept")

    @property
    def valid(self) -> Tensor | None:
        """(T, N) bool, the patches that have a placeholder; `None` if all do."""
        if max(self.tiles) == 1 and not self.has_newlines:
            return None
        patches = sum(self.tiles) * self.patches
        present = torch.zeros(patches + 1, dtype=torch.bool, device=self.slots.device)
        # Newlines and padding fall on the last entry. Assigning to an index would copy the value from the host.
        present = present.scatter(0, torch.where(self.slots < 0, patches, self.slots).flatten(), True)
        return present[:-1].view(-1, self.patches)

    def image_of_tile(self, like: Tensor) -> Tensor:
        """(T,) int64, the image that each tile belongs to, on the device of `like`."""
        return constant(like, tuple, tuple(image for image, size in enumerate(self.tiles) for _ in range(size)))

    def kept(self, kept_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The placeholders whose patch is kept, and the newlines that stay with them: two (I, L) bool.

        Args:
            kept_mask: (T, N) bool, patches that are kept.
        """
        kept = kept_mask.flatten()[self.slots.clamp(min=0)] & (self.slots >= 0)
        if not self.keeps_newlines:
            return kept, torch.zeros_like(kept)
        row_keeps = torch.zeros_like(self.rows[:, :1]).expand(-1, self.rows.shape[1] + 1)
        row_keeps = row_keeps.scatter_add(1, self.rows, kept.long()) > 0
        return kept, (self.slots == NEWLINE) & row_keeps.gather(1, self.rows)

    def counts(self, kept_mask: Tensor, merged_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Number of tokens and of newlines of each image after the choice: two (I,) int64.

        Args:
            kept_mask: (T, N) bool, patches that are kept.
            merged_counts: (T,) int64, number of merged tokens of each tile.
        """
        kept, newlines = self.kept(kept_mask)
        merged = torch.zeros_like(kept[:, 0], dtype=torch.long)
        merged = merged.index_add(0, self.image_of_tile(merged), merged_counts)
        return kept.sum(-1) + merged, newlines.sum(-1)

    def sequence(
        self, record: TokenRecoveryOutput, sizes: Sizes, length: int, leading: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The order in which an image's tokens enter the prompt: leading ones, kept ones and newlines, merged ones.

        Args:
            record: The chosen tokens, one row per tile.
            sizes: The sizes of the choice, as read.
            length: Tokens of the longest image, newlines included.
            leading: (T,) int64, number of merged tokens that stand before the kept ones; `None` means none.

        Returns:
            (I, length) int64 index into the packed tokens of all tiles, where `sizes.total` means a newline; and (I,
            length) int64, the placeholder that the token stands for. Rows are padded on the right.
        """
        kept, newlines = self.kept(record.kept_mask)
        start = (record.counts.cumsum(0) - record.counts).unsqueeze(-1)  # (T, 1)
        index = (start + record.cluster).flatten()[self.slots.clamp(min=0)]
        index = torch.where(newlines, sizes.total, index)  # (I, L)
        place = torch.arange(self.slots.shape[1], device=index.device).expand_as(index)
        parts = [(kept | newlines, index, place)]
        if sizes.most_merged:
            first, end = record.kept_mask.sum(-1, keepdim=True), record.counts.unsqueeze(-1)
            if leading is not None:
                leads = leading.unsqueeze(-1)
                none = torch.zeros_like(leads)
                parts.insert(0, self._merged(record, start, none, leads, sizes.most_merged, place))
                first = first + leads
            parts.append(self._merged(record, start, first, end, sizes.most_merged, place))
        keeps, index, place = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        column = torch.where(keeps, keeps.cumsum(-1) - 1, length)
        empty = index.new_zeros((index.shape[0], length + 1))
        return empty.scatter(1, column, index)[:, :length], empty.scatter(1, column, place)[:, :length]

    def _merged(
        self, record: TokenRecoveryOutput, start: Tensor, first: Tensor, end: Tensor, most: int, place: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens from `first` to before `end`, both (T, 1), of an image's tiles in one row; at most `most` of a tile.

        Returns:
            Existence, index and placeholder, each (I, S * M).
        """
        slot_of = self.slots.new_zeros(len(record.counts) * self.patches + 1)
        slot_of[self.slots.clamp(min=-1).flatten()] = place.flatten()
        token = first + torch.arange(most, device=start.device)  # (T, M)
        exists = token < end
        centre = record.places.gather(1, token.clamp(max=record.places.shape[1] - 1))  # -1 where it has no place
        tile = torch.arange(len(start), device=start.device).unsqueeze(-1)
        placed = torch.where(centre >= 0, slot_of[(tile * self.patches + centre).clamp(min=0)], 0)
        shape = (len(self.tiles), max(self.tiles), most)
        tile_of_image = constant(start, tuple, tuple(tile for size in self.tiles for tile in range(size)))
        seats = (self.image_of_tile(start), tile_of_image)
        spread = [values.new_zeros(shape).index_put(seats, values) for values in (exists, start + token, placed)]
        return tuple(values.flatten(1) for values in spread)  # type: ignore[return-value]


def _raster_slots(images: int, patches: int) -> Tensor:
    return torch.arange(images * patches).view(images, patches)


__all__ = ["NEWLINE", "PADDING", "ImageLayout"]
