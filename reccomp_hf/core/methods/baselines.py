"""Baselines that read no score: random patches, average pooling of the grid, and LLaVA-NeXT's base tile alone."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from ..features import Bounds, MergedTokens, Sizes, TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import cluster_means, constant, nonzero_first, positions, top_mask
from .budgets import budget_bounds, budget_table, budget_tokens
from .contract import BudgetUse, RecoveryMethod, check_int

_FINGERPRINT_BITS = 48
_LONGEST_CELL = 2  # of a pooled grid: length over width, in patches

# ---- random --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RandomOptions:
    """Options of `random`.

    Args:
        seed: An int >= 0; a different seed draws different patches.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed."""
        check_int("seed", self.seed, 0, 2**63 - 1)


def _select_random(features: VisualFeatures, settings: Settings) -> TokenSelection:
    """As many patches as the budget allows, drawn without regard to their content."""
    valid = features.per_image(features.valid, False)
    most = budget_tokens(settings.budget, valid.shape[1])
    # Only the device knows how many patches are valid.
    counts = torch.full_like(valid[:, 0], most, dtype=torch.long)
    if not features.uniform:
        counts = constant(valid, budget_table, settings.budget, valid.shape[1])[valid.sum(-1)]
    kept = features.per_tile(top_mask(features.per_image(_noise(features, settings.options.seed), 0.0), counts, valid))
    return features.keep(
        visual=kept,
        saliency=features.saliency(settings.visual_heads),
        known_sizes=Sizes(most, 0, most * len(kept)) if features.uniform else budget_bounds(features, settings.budget),
    )


def _noise(features: VisualFeatures, seed: int) -> Tensor:
    """(B, N) float32, uniform in [0, 1): a hash of the tile's features, of its place in the image, patch and seed.

    The features enter through comparisons of two patches in a channel, which float32 rounding does not flip: an image
    has the same noise in every batch. In half precision the features, and so the noise, may depend on the batch.
    """
    states, valid = features.hidden_states.detach(), features.valid
    _, patches, width = states.shape
    first, second, channel = constant(valid, _draws, patches, width)
    bits = states[:, first, channel] > states[:, second, channel]  # (B, bits)
    weights = torch.ones_like(first) << positions(first)
    start = _first_count(seed)
    place = constant(valid, tuple, tuple(start + tile for size in features.tiles for tile in range(size)))
    mixed = _hash((bits * weights).sum(-1) + _hash(place))  # (B,)
    mixed = _hash(mixed.unsqueeze(-1) + torch.arange(patches, device=valid.device))
    return (mixed & 0xFFFFFF).float() / 2**24


def _draws(patches: int, width: int) -> Tensor:
    """(3, bits) int64: two patches and a channel for each comparison."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(2**31, (3, _FINGERPRINT_BITS), generator=generator)
    return draws % torch.tensor([[patches], [patches], [width]])


def _first_count(seed: int) -> int:
    """The number from which a seed counts: far from other seeds, below 2^56; 0 for seed 0."""
    start = seed.bit_length()
    while seed:
        start, seed = (start + seed % 2**32) * 6364136223846793005 % 2**56, seed >> 32
    return start


def _hash(values: Tensor) -> Tensor:
    """Hash of every int64: two rounds of shift, exclusive or and multiplication, which wraps around."""
    for factor in (-7046029254386353131, -4417276706812531889):  # odd, with irregular bits
        values = (values ^ ((values >> 31) & 0x1FFFFFFFF)) * factor
    return values ^ ((values >> 29) & 0x7FFFFFFFF)


# ---- pooling -------------------------------------------------------------------------------------------------------


def _select_pooling(side: int | None, features: VisualFeatures, settings: Settings) -> TokenSelection:
    """Every cell of the grid becomes its mean; the cell's first patch is its centre."""
    cell = _cells(side, features, settings)
    index, beyond = positions(cell), cell.shape[1]
    lowest = index.new_full(index.shape, beyond)
    lowest = lowest.scatter_reduce(1, cell, index.masked_fill(~features.valid, beyond), "amin")
    centres = features.valid & (lowest.gather(1, cell) == index)
    if features.uniform:
        cells = math.prod(_shape(side, features.grid, settings.budget))
        known: Sizes | Bounds = Sizes(cells, cells, cells * len(cell))
    else:
        slots, patches = max(features.tiles), features.valid.shape[1]
        of_images = [_most_cells(side, features.grid, settings.budget, tiles, slots) for tiles in features.tiles]
        longest = min(patches, _most_cells(side, features.grid, settings.budget, 1, slots))
        known = Bounds(longest, longest, sum(of_images), max(of_images))
    return features.keep(
        centres=centres,
        merged_counts=centres.sum(-1),
        saliency=features.saliency(settings.visual_heads),
        known_sizes=known,
    )


def _merge_pooling(
    side: int | None,
    features: VisualFeatures,
    selection: TokenSelection,
    settings: Settings,
    max_merged: int,
) -> MergedTokens:
    cell = _cells(side, features, settings)
    rank = selection.centre_mask.cumsum(-1) - 1
    of_cell = torch.zeros_like(rank)
    of_cell = of_cell.scatter_reduce(1, cell, rank.masked_fill(~selection.centre_mask, -1), "amax", include_self=False)
    cluster = of_cell.gather(1, cell).masked_fill(~features.valid, -1)
    tokens = cluster_means(features.hidden_states, cluster, torch.ones_like(selection.saliency), max_merged)
    return MergedTokens(tokens, nonzero_first(selection.centre_mask, max_merged), cluster)


def _cells(side: int | None, features: VisualFeatures, settings: Settings) -> Tensor:
    """(B, N) int64, the cell that each patch belongs to; cells are counted row by row."""
    (rows, columns), device = features.grid, features.valid.device
    patch = torch.arange(rows * columns, device=device)
    row, column = patch // columns, patch % columns
    if side is not None:
        return (row // side * -(-columns // side) + column // side).expand_as(features.valid)
    if isinstance(settings.budget, float) or features.uniform:
        cell_rows, cell_columns = _shape(side, features.grid, settings.budget)
        return (row * cell_rows // rows * cell_columns + column * cell_columns // columns).expand_as(features.valid)
    # An int is spent evenly over all tiles of an image; only the device knows how many patches those have.
    patches = features.per_image(features.valid, False).sum(-1, keepdim=True)  # (I, 1)
    table = constant(patches, _shape_table, features.grid, settings.budget or 1, max(features.tiles))
    shape = table[patches.expand(-1, max(features.tiles))]  # (I, S, 2)
    down, across = (features.per_tile(size) for size in shape.unbind(-1))  # (B, 1) each
    return row * down // rows * across + column * across // columns


@functools.lru_cache(maxsize=256, typed=True)
def _most_cells(side: int | None, grid: tuple[int, int], budget: float | None, tiles: int, slots: int) -> int:
    """Cells with a patch in `tiles` of an image's tiles, whichever patches are valid; `slots` is the most it may have.

    An image of few valid patches has small cells; then there are no more of them than patches.
    """
    if side is not None or isinstance(budget, float):
        return tiles * math.prod(_shape(side, grid, budget))
    table = _shape_table(grid, budget or 1, slots)
    return max(min(count, tiles * math.prod(shape)) for count, shape in enumerate(table))


def _shape(side: int | None, grid: tuple[int, int], budget: float | None) -> tuple[int, int]:
    """Rows and columns of cells on a whole grid."""
    if side is not None:
        return -(-grid[0] // side), -(-grid[1] // side)
    return cell_grid(grid, budget_tokens(budget, grid[0] * grid[1]))


@functools.lru_cache(maxsize=4096)
def cell_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """Rows and columns of the cells that a grid of patches is pooled to: as close to the budget as cells allow.

    A cell is at most twice as long as wide (longer only if a side of the grid stays as it is). Among those shapes the
    number of cells closest to the budget wins, then the squarest cells, then the fewest rows: on 12 x 12 patches a
    budget of 16 gives 4 x 4 cells, 8 gives 2 x 4, and 14 gives 3 x 5.

    Args:
        grid: (rows, columns) of patches.
        budget: Wanted number of cells, at least 1.

    Returns:
        (rows, columns) of cells; no more than the grid has.
    """

    def length(down: int, across: int) -> float:
        height, width = grid[0] / down, grid[1] / across
        return max(height, width) / min(height, width)

    shapes = [(down, across) for down in range(1, grid[0] + 1) for across in range(1, grid[1] + 1)]
    sensible = [
        shape for shape in shapes if length(*shape) <= _LONGEST_CELL or shape[0] == grid[0] or shape[1] == grid[1]
    ]
    return min(sensible, key=lambda shape: (abs(shape[0] * shape[1] - budget), length(*shape), shape))


@functools.lru_cache(maxsize=16)
def _shape_table(grid: tuple[int, int], budget: int, tiles: int) -> list[tuple[int, int]]:
    """Cells of each tile for every number of patches that an image of up to `tiles` tiles can have."""
    area = grid[0] * grid[1]
    wanted = [
        min(area, max(1, (2 * budget * area // max(patches, 1) + 1) // 2)) for patches in range(tiles * area + 1)
    ]
    return [cell_grid(grid, cells) for cells in wanted]


# ---- the base tile -------------------------------------------------------------------------------------------------


def _select_base_tile(features: VisualFeatures, settings: Settings) -> TokenSelection:
    """The first tile of each image as it is, the others dropped."""
    is_base = constant(features.valid, tuple, tuple(tile == 0 for size in features.tiles for tile in range(size)))
    kept = features.valid & is_base.unsqueeze(-1)
    patches, images = kept.shape[1], len(features.tiles)
    known = Sizes(patches, 0, images * patches) if features.uniform else Bounds(patches, 0, images * patches, patches)
    return features.keep(visual=kept, saliency=features.saliency(settings.visual_heads), known_sizes=known)


def _pooling(side: int | None, budget: BudgetUse) -> RecoveryMethod:
    select, merge = functools.partial(_select_pooling, side), functools.partial(_merge_pooling, side)
    return RecoveryMethod(select, merge, budget=budget, fields=())


RANDOM = RecoveryMethod(_select_random, budget="required", options=RandomOptions, fields=())
POOLING, POOLING_2X2, POOLING_3X3 = _pooling(None, "required"), _pooling(2, "none"), _pooling(3, "none")
BASE_TILE = RecoveryMethod(_select_base_tile, budget="none", fields=())

__all__ = ["BASE_TILE", "POOLING", "POOLING_2X2", "POOLING_3X3", "RANDOM", "cell_grid"]
