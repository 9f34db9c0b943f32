"""The parts of an image as the model sees it: one square for LLaVA-1.5, overview and details for LLaVA-NeXT."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ..core.features import TokenRecoveryOutput


@dataclasses.dataclass
class Region:
    """A part of the image as the model sees it.

    Attributes:
        picture: RGB image.
        patches: (rows, columns) index of the patch in each cell, counted over all tiles of the image.
        name: A word for the reader where there are several parts.
    """

    picture: Image.Image
    patches: npt.NDArray[np.int64]
    name: str


def regions_of(image: Image.Image, records: Sequence[TokenRecoveryOutput], processor: Any) -> list[Region]:
    """One region for LLaVA-1.5; for LLaVA-NeXT the base tile, and the other tiles joined and unpadded.

    Args:
        image: RGB image as passed to the processor.
        records: The outputs of `model.recover` for the image.
        processor: The model's processor; without it the image is cropped to its middle square.

    Raises:
        ValueError: The records do not belong to one image, or have tiles while there is no processor.
    """
    tiles, patches = records[0].cluster.shape
    side = int(patches**0.5)
    for record in records:
        if record.cluster.shape != records[0].cluster.shape or side * side != patches:
            raise ValueError(
                f"Records must belong to one image with a square grid of patches, got cluster of shapes "
                f"{[tuple(one.cluster.shape) for one in records]}."
            )
    if processor is None:
        if tiles > 1:
            raise ValueError(f"The record has {tiles} tiles: pass processor=, which is needed to place them.")
        return [Region(_middle_square(image), _raster(side), "")]
    pictures = processed_tiles(image, processor)
    if len(pictures) < tiles:
        raise ValueError(f"The record has {tiles} tiles, but the processor cuts this image into {len(pictures)}.")
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if not pinpoints:
        return [Region(pictures[0], _raster(side), "")]
    base = Region(pictures[0], _raster(side), "overview")
    return [base, *_detail(image, pictures[1:tiles], side, pinpoints)]


def _raster(side: int) -> npt.NDArray[np.int64]:
    return np.arange(side * side).reshape(side, side)


def _middle_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def processed_tiles(image: Image.Image, processor: Any) -> list[Image.Image]:
    """The tiles as the processor scales and crops them, before colours are normalised."""
    settings = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
    values = processor.image_processor(images=image, **settings)["pixel_values"]
    values = torch.as_tensor(np.asarray(values)).flatten(0, -4)  # (tiles, 3, height, width)
    tiles = values.permute(0, 2, 3, 1).clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(tile) for tile in tiles]


def _detail(image: Image.Image, pictures: list[Image.Image], side: int, pinpoints: Any) -> list[Region]:
    """The tiles after the base tile in their places, without the padding; empty where none of it is read."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    size, tile = (image.height, image.width), pictures[0].width
    down, across = get_anyres_image_grid_shape(size, pinpoints, tile)
    whole = Image.new("RGB", (across * tile, down * tile))
    cells = np.empty((down * side, across * side), dtype=np.int64)
    for number, picture in enumerate(pictures[: down * across]):
        row, column = divmod(number, across)
        whole.paste(picture, (column * tile, row * tile))
        place = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        cells[place] = _raster(side) + (number + 1) * side * side
    visible = unpad_image(torch.from_numpy(cells)[None], size)[0].numpy()
    if visible.size == 0:
        return []
    top, left = (int(index[0]) for index in np.where(cells == visible[0, 0]))
    rows, columns = visible.shape
    patch = tile / side
    edges = (left * patch, top * patch, (left + columns) * patch, (top + rows) * patch)
    x, y, right, bottom = map(round, edges)
    return [Region(whole.crop((x, y, right, bottom)), visible, "details")]


__all__ = ["Region", "processed_tiles", "regions_of"]
