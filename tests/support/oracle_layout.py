"""The oracle of LLaVA-NeXT's layout: which patches and newlines an image of a size has, by plain loops."""

from __future__ import annotations

from reccomp_hf.core.layout import NEWLINE

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of the published LLaVA-NeXT checkpoints
SIDE, PATCH = 336, 14
CELLS = SIDE // PATCH
PATCHES = CELLS**2
Size = tuple[int, int]  # height, width


def best_pinpoint(size: Size) -> Size:
    """The pinpoint that shows most of the picture's pixels, then the one that wastes least."""
    best, chosen = (-1, 0), (0, 0)
    for height, width in PINPOINTS:
        scale = min(width / size[1], height / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        if (shown, shown - height * width) > best:
            best, chosen = (shown, shown - height * width), (height, width)
    return chosen


def visible_cells(size: Size) -> tuple[range, range]:
    """Rows and columns of patches of the whole tile grid that unpadding leaves."""
    height, width = (length // SIDE * CELLS for length in best_pinpoint(size))
    if size[1] / size[0] > width / height:
        cut = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return range(cut, height - cut), range(width)
    cut = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return range(height), range(cut, width - cut)


def packed_oracle(size: Size) -> tuple[list[int], list[int], int]:
    """An image's slots (patch counted over its own tiles, or NEWLINE), the row each belongs to, and its tiles."""
    height, width = best_pinpoint(size)
    tiles_across = width // SIDE
    slots, rows = list(range(PATCHES)), [0] * PATCHES  # the base tile: one row without a newline
    visible_rows, visible_columns = visible_cells(size)
    for number, y in enumerate(visible_rows, start=1):
        for x in visible_columns:
            tile = 1 + y // CELLS * tiles_across + x // CELLS
            slots.append(tile * PATCHES + y % CELLS * CELLS + x % CELLS)
            rows.append(number)
        slots.append(NEWLINE)
        rows.append(number)
    return slots, rows, 1 + height // SIDE * tiles_across
