"""Comparison settings that look at no score: chance, average pooling of the grid, and LLaVA-NeXT's base tile alone."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import cluster_means, nonzero_first, positions, top_mask
from .budgets import count_of, count_table
from .contract import Budget, RecoveryMethod, check_int

_FINGERPRINT_BITS = 48
_LONGEST_CELL = 2  # of a pooled grid: length over width, in patches

# ---- random --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RandomOptions:
    """Options of `random`.

    Args:
        seed: An int >= 0; another one draws other patches.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed."""
        check_int("seed", self.seed, 0)


def _select_random(features: VisualFeatures, config: Settings) -> TokenSelection:
    """So many patches as the budget says, drawn without regard to what they show."""
    none = torch.zeros_like(features.valid)
    valid = features.per_image(features.valid, False)
    uniform, most = features.all_valid and max(features.tiles) == 1, count_of(config.budget, valid.shape[1])
    # How many patches are valid is known on the device alone.
    counts = torch.tensor([most] * len(valid) if uniform else count_table(config.budget, valid.shape[1]))
    counts = counts.to(valid.device, non_blocking=True)
    counts = counts if uniform else counts[valid.sum(-1)]
    kept = features.per_tile(top_mask(features.per_image(_noise(features, config.options.seed), 0.0), counts, valid))
    return TokenSelection(
        visual_mask=kept,
        text_mask=none,
        coverage_mask=none,
        centre_mask=none,
        merged_counts=torch.zeros_like(kept.sum(-1)),
        saliency=features.saliency(config.visual_heads),
        known_sizes=[most, 0, most * len(none)] if uniform else None,
    )


def _noise(features: VisualFeatures, seed: int) -> Tensor:
    """(B, N) float32, uniform in [0, 1): a hash of the tile's features, of its place in the image, patch and seed.

    The features enter by comparisons of two patches in a channel, which rounding does not turn round in float32: a
    picture has the same noise in every batch. In half precision features, and so the noise, may depend on the batch.
    """
    states, device = features.hidden_states.detach(), features.valid.device
    _, patches, width = states.shape
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(2**31, (3, _FINGERPRINT_BITS), generator=generator)
    first, second, channel = (draws % torch.tensor([[patches], [patches], [width]])).to(device, non_blocking=True)
    bits = states[:, first, channel] > states[:, second, channel]  # (B, bits)
    weights = (torch.ones(_FINGERPRINT_BITS, dtype=torch.int64) << torch.arange(_FINGERPRINT_BITS)).to(
        device, non_blocking=True
    )
    start = _start(seed)
    place = torch.tensor([start + tile for size in features.tiles for tile in range(size)])
    mixed = _scrambled((bits * weights).sum(-1) + _scrambled(place.to(device, non_blocking=True)))  # (B,)
    mixed = _scrambled(mixed.unsqueeze(-1) + torch.arange(patches, device=device))
    return (mixed & 0xFFFFFF).float() / 2**24


def _start(seed: int) -> int:
    """Where a seed of any size begins to count: far from other seeds, below 2^56; 0 for seed 0."""
    start = seed.bit_length()
    while seed:
        start, seed = (start + seed % 2**32) * 6364136223846793005 % 2**56, seed >> 32
    return start


def _scrambled(values: Tensor) -> Tensor:
    """Hash of every int64: two rounds of shift, exclusive or and multiplication, which wraps round."""
    for factor in (-7046029254386353131, -4417276706812531889):  # odd, with irregular bits
        values = (values ^ ((values >> 31) & 0x1FFFFFFFF)) * factor
    return values ^ ((values >> 29) & 0x7FFFFFFFF)


# ---- pooling -------------------------------------------------------------------------------------------------------


def _select_pooling(side: int | None, features: VisualFeatures, config: Settings) -> TokenSelection:
    """Every cell of the grid becomes its mean; its first patch stands for it."""
    none = torch.zeros_like(features.valid)
    cell = _cells(side, features, config)
    index, beyond = positions(cell), cell.shape[1]
    lowest = index.new_full(index.shape, beyond)
    lowest = lowest.scatter_reduce(1, cell, index.masked_fill(~features.valid, beyond), "amin")
    centres = features.valid & (lowest.gather(1, cell) == index)
    saliency, known = features.saliency(config.visual_heads), None
    if features.all_valid and max(features.tiles) == 1:
        rows, columns = _shape(side, features.grid, config.budget)
        known = [rows * columns, rows * columns, rows * columns * len(none)]
    return TokenSelection(none, none, none, centres, centres.sum(-1), saliency, known)


def _merge_pooling(
    side: int | None,
    features: VisualFeatures,
    selection: TokenSelection,
    config: Settings,
    max_merged: int,
) -> MergedTokens:
    cell = _cells(side, features, config)
    rank = selection.centre_mask.cumsum(-1) - 1
    of_cell = torch.zeros_like(rank)
    of_cell = of_cell.scatter_reduce(1, cell, rank.masked_fill(~selection.centre_mask, -1), "amax", include_self=False)
    cluster = of_cell.gather(1, cell).masked_fill(~features.valid, -1)
    tokens = cluster_means(features.hidden_states, cluster, torch.ones_like(selection.saliency), max_merged)
    return MergedTokens(tokens, nonzero_first(selection.centre_mask, max_merged), cluster)


def _cells(side: int | None, features: VisualFeatures, config: Settings) -> Tensor:
    """(B, N) int64, the cell that each patch belongs to; cells are counted row by row."""
    (rows, columns), device = features.grid, features.valid.device
    patch = torch.arange(rows * columns, device=device)
    row, column = patch // columns, patch % columns
    if side is not None:
        return (row // side * -(-columns // side) + column // side).expand_as(features.valid)
    if isinstance(config.budget, float) or (max(features.tiles) == 1 and features.all_valid):
        cell_rows, cell_columns = _shape(side, features.grid, config.budget)
        return (row * cell_rows // rows * cell_columns + column * cell_columns // columns).expand_as(features.valid)
    # An int is spent evenly over all tiles of an image; how many patches those have is known on the device alone.
    patches = features.per_image(features.valid, False).sum(-1, keepdim=True)  # (I, 1)
    table = torch.tensor(_shape_table(features.grid, config.budget or 1, max(features.tiles)))
    shape = table.to(device, non_blocking=True)[patches.expand(-1, max(features.tiles))]  # (I, S, 2)
    down, across = (features.per_tile(size) for size in shape.unbind(-1))  # (B, 1) each
    return row * down // rows * across + column * across // columns


def _shape(side: int | None, grid: tuple[int, int], budget: float | None) -> tuple[int, int]:
    """Rows and columns of cells on a whole grid."""
    if side is not None:
        return -(-grid[0] // side), -(-grid[1] // side)
    return cell_grid(grid, count_of(budget, grid[0] * grid[1]))


@functools.lru_cache(maxsize=4096)
def cell_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """Rows and columns of the cells that a grid of patches is pooled to, as near to the budget as sensible cells come.

    A cell may be twice as long as it is wide (longer where a side of the grid stays as it is). Of those, the number
    of cells next to the budget is taken, then the squarest cells, then the fewest rows: 16 of 12 x 12 patches become
    4 x 4 cells, 8 become 2 x 4, and 14 become 3 x 5.

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
    """Cells of each tile for every number of patches that an image of up to so many tiles can have."""
    area = grid[0] * grid[1]
    wanted = [
        min(area, max(1, (2 * budget * area // max(patches, 1) + 1) // 2)) for patches in range(tiles * area + 1)
    ]
    return [cell_grid(grid, cells) for cells in wanted]


# ---- the base tile -------------------------------------------------------------------------------------------------


def _select_base_tile(features: VisualFeatures, config: Settings) -> TokenSelection:
    """The first tile of each image as it is, the others dropped."""
    none = torch.zeros_like(features.valid)
    is_base = torch.tensor([tile == 0 for size in features.tiles for tile in range(size)])
    is_base = is_base.to(none.device, non_blocking=True)
    kept = features.valid & is_base.unsqueeze(-1)
    return TokenSelection(
        kept, none, none, none, torch.zeros_like(none.sum(-1)), features.saliency(config.visual_heads)
    )


def _pooling(side: int | None, budget: Budget) -> RecoveryMethod:
    select, merge = functools.partial(_select_pooling, side), functools.partial(_merge_pooling, side)
    return RecoveryMethod(select, merge, budget=budget, fields=())


RANDOM = RecoveryMethod(_select_random, budget="required", options=RandomOptions, fields=())
POOLING, POOLING_2X2, POOLING_3X3 = _pooling(None, "required"), _pooling(2, "none"), _pooling(3, "none")
BASE_TILE = RecoveryMethod(_select_base_tile, budget="none", fields=())

__all__ = ["BASE_TILE", "POOLING", "POOLING_2X2", "POOLING_3X3", "RANDOM", "cell_grid"]
