"""Counting the visual tokens of an image before and after compression."""

from __future__ import annotations

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
from .features import Sizes, TokenSelection, VisualFeatures
from .methods.budgets import budget_tokens

PICTURE = (640, 480)
"""Width and height of the image that counts of LLaVA-NeXT assume by default: its tokens depend on them."""

PAPER_SHARE = 56 / 576
"""Share of the visual tokens that the paper's table keeps."""


def picture_tokens(config: Any, picture: tuple[int, int] = PICTURE) -> tuple[int, int, int]:
    """Number of tiles, patch tokens and newline tokens of an image in the stock model.

    For LLaVA-1.5 every image is one tile without newlines.

    Args:
        config: A LLaVA config, stock or ours.
        picture: Width and height in pixels; read for LLaVA-NeXT only.
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
    """Visual tokens of a compressed image without newlines; the paper's share if the number depends on the image.

    With rules it is the largest number under any of them.
    """
    counts = [fixed_tokens(config, settings, picture) for settings in section.all_settings]
    share = round(picture_tokens(config, picture)[1] * PAPER_SHARE)
    return max(share if count is None else count for count in counts)


def fixed_tokens(config: Any, section: TokenRecoveryConfig, picture: tuple[int, int] = PICTURE) -> int | None:
    """Visual tokens of every compressed image of a size, without newlines; `None` if the number depends on the image.

    With rules it is the largest number under any of them. A method without a budget is run on a blank image of width
    1.
    """
    if section.rules:
        counts = [fixed_tokens(config, settings, picture) for settings in section.all_settings]
        return None if None in counts else max(count for count in counts if count is not None)
    tiles, patches, _ = picture_tokens(config, picture)
    if not section.enabled:
        return patches
    if section.budget is not None:
        return budget_tokens(section.budget, patches)
    sizes = blank_selection(section, tiles, patches_per_side(config)).known_sizes
    return min(sizes.total, patches) if isinstance(sizes, Sizes) else None


def blank_selection(section: TokenRecoveryConfig, tiles: int, side: int) -> TokenSelection:
    """The choice of a section for one blank image of `tiles` tiles of `side` x `side` patches."""
    keys, similarity = torch.zeros(tiles, side * side + 1, 1), torch.zeros(tiles, side * side)
    states = keys[:, 1:]
    received = similarity.unsqueeze(1).expand(-1, 2, -1)
    features = VisualFeatures(
        states,
        keys[:, 0],
        keys,
        similarity,
        tiles=[tiles],
        projected=states,
        received=received,
        class_state=keys[:, 0],
        word_similarity=similarity.unsqueeze(1),
    )
    check_features(features, section)
    return select_tokens(features, section)


def patches_per_side(config: Any) -> int:
    """Number of patches along a side of a tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


__all__ = [
    "PAPER_SHARE",
    "PICTURE",
    "blank_selection",
    "compressed_tokens",
    "fixed_tokens",
    "patches_per_side",
    "picture_tokens",
]
