"""LLaVA-NeXT with token recovery: what tiles, unpadding and newlines add."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModelOutputWithPast,
    image_size_to_num_patches,
)

from .compat import register_key_renames
from .configuration import LlavaNextRecCompConfig
from .generation import RecCompGenerationMixin
from .layout import NEWLINE, ImageLayout
from .modeling import RecCompMixin
from .outputs import CompressedFields
from .settings import shown
from .tensor_checks import check_tensor
from .tensors import constant


@dataclasses.dataclass
class LlavaNextRecCompModelOutputWithPast(CompressedFields, LlavaNextModelOutputWithPast):
    """The stock output for the shortened sequence, see [`CompressedFields`]."""


@dataclasses.dataclass
class LlavaNextRecCompCausalLMOutputWithPast(CompressedFields, LlavaNextCausalLMOutputWithPast):
    """The stock output for the shortened sequence, with loss and logits of it, see [`CompressedFields`]."""


def tiled_layout(config: Any, pixel_values: Tensor, image_sizes: list[list[int]]) -> tuple[Tensor, ImageLayout]:
    """The tiles and placeholders of images of any size, in the order of stock `pack_image_features`.

    Args:
        config: A LLaVA-NeXT config.
        pixel_values: (T, 3, H, W) tiles, or (I, S, 3, H, W) with images of fewer than S tiles padded.
        image_sizes: Height and width in pixels of every image.

    Returns:
        Tiles (T, 3, H, W) of all images, and the placeholders that stand for their patches.

    Raises:
        ValueError: Numbers of images or tiles that do not fit.
    """
    side = config.vision_config.image_size
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in image_sizes]
    if pixel_values.ndim == 5:
        if len(pixel_values) != len(image_sizes) or pixel_values.shape[1] < max(tiles):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} do not fit {len(image_sizes)} image_sizes that "
                f"need up to {max(tiles)} tiles."
            )
        pixel_values = torch.cat([image[:count] for image, count in zip(pixel_values, tiles, strict=True)])
    if len(pixel_values) != sum(tiles):
        raise ValueError(f"pixel_values hold {len(pixel_values)} tiles, image_sizes need {sum(tiles)}.")
    sizes, pinpoints = (tuple(map(tuple, pairs)) for pairs in (image_sizes, config.image_grid_pinpoints))
    arguments = (sizes, tuple(tiles), pinpoints, side, config.vision_config.patch_size)
    slots, rows = constant(pixel_values, _packed_index, *arguments)
    return pixel_values, dataclasses.replace(_packed_layout(*arguments), slots=slots, rows=rows)


@functools.lru_cache(maxsize=64)
def _packed_layout(
    image_sizes: tuple[tuple[int, ...], ...],
    tiles: tuple[int, ...],
    pinpoints: tuple[tuple[int, ...], ...],
    side: int,
    patch: int,
) -> ImageLayout:
    """The layout on the host, from the order in which stock LLaVA-NeXT packs an index of patches."""
    vision = types.SimpleNamespace(image_size=side, patch_size=patch)
    config = types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(pair) for pair in pinpoints])
    patches = (side // patch) ** 2
    index = [torch.arange(count * patches).view(count, patches, 1) for count in tiles]
    packed, _ = LlavaNextModel.pack_image_features(
        types.SimpleNamespace(config=config),  # it reads nothing of a model but the config
        index,
        [list(size) for size in image_sizes],
        "default",
        image_newline=torch.tensor([NEWLINE]),
    )
    return ImageLayout.of_packed([order.squeeze(-1) for order in packed], list(tiles), patches)


def _packed_index(*arguments: Any) -> Tensor:
    """(2, I, L) int64, slots and rows of the layout."""
    layout = _packed_layout(*arguments)
    return torch.stack([layout.slots, layout.rows])


def _pairs(image_sizes: Any) -> list[list[int]]:
    """`image_sizes` of a call as numbers.

    Raises:
        ValueError: Anything but pairs of whole, positive numbers of pixels.
    """
    if isinstance(image_sizes, Tensor):
        check_tensor("image_sizes", image_sizes)
    values = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    try:
        pairs = [[int(number) for number in size] for size in values]
        fits = (
            bool(pairs)
            and pairs == [list(size) for size in values]
            and all(len(size) == 2 and min(size) > 0 for size in pairs)
        )
    except (TypeError, ValueError, OverflowError):
        fits = False
    if fits:
        return pairs
    of_shape = f" of shape {tuple(image_sizes.shape)}" if isinstance(image_sizes, Tensor) else ""
    raise ValueError(
        "image_sizes must be the height and width in pixels of every image, (images, 2) whole and positive numbers "
        f"as the processor returns them, got {type(image_sizes).__name__}{of_shape}: {shown(values)}."
    )


class _TiledMixin:
    """The layout of images that are cut into tiles."""

    def _layout(self, pixel_values: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, ImageLayout]:
        """Tiles (T, 3, H, W) of all images, and the placeholders that stand for their patches.

        Reads `image_sizes` from the device: the number of tiles depends on them.
        """
        if image_sizes is None:
            raise ValueError("LLaVA-NeXT needs image_sizes with pixel_values; the processor returns both.")
        return tiled_layout(self.config, pixel_values, _pairs(image_sizes))  # type: ignore[attr-defined]


class LlavaNextRecCompModel(_TiledMixin, RecCompMixin, LlavaNextModel):
    """`LlavaNextModel` (no language-model head) that reads recovered tokens."""

    config_class = LlavaNextRecCompConfig
    output_class = LlavaNextRecCompModelOutputWithPast
    _keys_to_ignore_on_load_unexpected = ["lm_head"]


class LlavaNextRecCompForConditionalGeneration(_TiledMixin, RecCompGenerationMixin, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` that reads recovered tokens."""

    config_class = LlavaNextRecCompConfig
    output_class = LlavaNextRecCompCausalLMOutputWithPast


# Here and not in the package's __init__: with trust_remote_code this file alone is imported.
register_key_renames("LlavaNextRecCompForConditionalGeneration", "llava_next")
register_key_renames("LlavaNextRecCompModel", "LlavaNextModel")

__all__ = ["LlavaNextRecCompForConditionalGeneration", "LlavaNextRecCompModel", "tiled_layout"]
