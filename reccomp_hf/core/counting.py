"""How many visual tokens an image has, and how many it becomes."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from .checks import is_tiled
from .choosing import check_features, select_tokens
from .configuration import TokenRecoveryConfig

PICTURE = (640, 480)
"""Width and height of the picture that a LLaVA-NeXT is reckoned with: its tokens depend on it."""


PAPER_SHARE = 56 / 576
"""Share of the visual tokens that the paper's table keeps."""


def picture_tokens(config: Any, picture: tuple[int, int] = PICTURE) -> tuple[int, int, int]:
    """Tiles, patch tokens and newline tokens of a picture of some width and height, in the stock model.

    For LLaVA-1.5 every picture is one tile without newlines.
    """
    side, pixels = patches_per_side(config), config.vision_config.image_size
    if not is_tiled(config):
        return 1, side * side, 0
    size = (picture[1], picture[0])
    tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, pixels)
    high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, pixels)
    rows, columns = unpad_image(torch.empty(1, high * side, wide * side, device="meta"), size).shape[1:]
    return tiles, side * side + rows * columns, rows


def compressed_tokens(config: Any, section: TokenRecoveryConfig, picture: tuple[int, int] = PICTURE) -> int:
    """Visual tokens that a picture becomes, newlines apart; about the paper's tenth where the picture decides."""
    fixed, (_, patches, _) = fixed_tokens(config, section, picture), picture_tokens(config, picture)
    return round(patches * PAPER_SHARE) if fixed is None else fixed


def fixed_tokens(config: Any, section: TokenRecoveryConfig, picture: tuple[int, int] = PICTURE) -> int | None:
    """Visual tokens that every picture of a size becomes, newlines apart; `None` where its content decides.

    Methods without a budget are asked themselves, with a blank picture of width 1.
    """
    tiles, patches, _ = picture_tokens(config, picture)
    if not section.enabled:
        return patches
    if isinstance(section.budget, int):
        return min(section.budget, patches)
    if section.budget is not None:
        return max(1, math.floor(section.budget * patches + 0.5))
    grid = patches_per_side(config) ** 2
    blank, scores = torch.zeros(tiles, grid + 1, 1), torch.zeros(tiles, grid)
    states = blank[:, 1:]
    features = check_features(states, blank[:, 0], blank, scores, section, tiles=[tiles], projected=states)
    sizes = select_tokens(features, section).known_sizes
    return None if sizes is None else min(sizes[2], patches)


def patches_per_side(config: Any) -> int:
    """Patches along a side of a tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


__all__ = ["PAPER_SHARE", "PICTURE", "compressed_tokens", "fixed_tokens", "patches_per_side", "picture_tokens"]
