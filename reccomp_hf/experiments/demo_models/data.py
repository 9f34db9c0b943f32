"""Training scenes, drawn once into files, and the batches of a step."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...demo.scenes import (
    CLOSE_UP_SIZE,
    COLORS,
    IMAGE_SIZE,
    LETTERS,
    SHAPES,
    VALIDATION_SEEDS,
    SceneObject,
    draw_close_up,
    draw_scene,
)

logger = logging.getLogger(__name__)

MOST_OBJECTS = 5
NOTHING = -1  # in the columns of `Scenes.objects`: no object in this row, or no letter on this object

_CHUNK = 500  # scenes that one process draws at a time
_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes as arrays.

    Attributes:
        pictures: (N, 96, 96, 3), uint8; close-ups are (N, 48, 48, 3).
        objects: (N, 5, 6), int16: index of the color, of the shape and of the letter, then x, y and size of the box
            in pixels; `NOTHING` stands for a missing object or letter.
    """

    pictures: np.ndarray
    objects: np.ndarray


def draw_scenes(seeds: range, close_ups: bool = False) -> Scenes:
    """Draw the scenes, or the close-ups, of consecutive seeds into memory."""
    draw, size = (draw_close_up, CLOSE_UP_SIZE) if close_ups else (draw_scene, IMAGE_SIZE)
    pictures = np.empty((len(seeds), size, size, 3), np.uint8)
    objects = np.full((len(seeds), MOST_OBJECTS, 6), NOTHING, np.int16)
    for row, seed in enumerate(seeds):
        scene = draw(seed)
        pictures[row] = np.asarray(scene.image)
        for place, item in enumerate(scene.objects):
            letter = NOTHING if item.letter is None else LETTERS.index(item.letter)
            objects[row, place] = (_COLOR_NAMES.index(item.color), SHAPES.index(item.shape), letter, *item.box)
    return Scenes(pictures, objects)


def cached_scenes(folder: Path, seeds: range, processes: int = 1, close_ups: bool = False) -> Scenes:
    """Open the scenes of consecutive seeds, drawing them into `folder` the first time.

    Files appear whole or not at all, so several runs may share a folder.
    """
    name = f"{'close-ups-' if close_ups else ''}{seeds.start}-{seeds.stop}"
    pictures_file, objects_file = folder / f"pictures-{name}.npy", folder / f"objects-{name}.npy"
    if not (pictures_file.exists() and objects_file.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("drawing %d scenes into %s", len(seeds), folder)
        with file_in_place(pictures_file) as temporary:
            size = CLOSE_UP_SIZE if close_ups else IMAGE_SIZE
            shape = (len(seeds), size, size, 3)
            pictures = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            objects = np.empty((len(seeds), MOST_OBJECTS, 6), np.int16)
            first = 0
            for chunk in _draw_chunks(seeds, processes, close_ups):
                rows = slice(first, first + len(chunk.objects))
                pictures[rows], objects[rows] = chunk.pictures, chunk.objects
                first = rows.stop
            pictures.flush()
        with file_in_place(objects_file) as temporary, temporary.open("wb") as stream:
            np.save(stream, objects)
    return Scenes(np.load(pictures_file, mmap_mode="r"), np.load(objects_file))


def validation_scenes(number: int) -> Scenes:
    """The first validation scenes, which are neither trained on nor used for a reported number."""
    return draw_scenes(VALIDATION_SEEDS[:number])


def _draw_chunks(seeds: range, processes: int, close_ups: bool) -> Iterator[Scenes]:
    chunks = [seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK)]
    draw = partial(draw_scenes, close_ups=close_ups)
    if processes == 1:
        yield from tqdm(map(draw, chunks), "scenes", len(chunks))
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from tqdm(pool.map(draw, chunks), "scenes", len(chunks))


@contextmanager
def file_in_place(path: Path) -> Iterator[Path]:
    """Give a temporary file, which replaces `path` if no error is raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- batches -------------------------------------------------------------------------------------------------------


def batch_rows(step: int, size: int, number: int, seed: int) -> np.ndarray:
    """Rows (size,) of the scenes of a step, in ascending order; every epoch takes all scenes in a new order."""
    epoch, place = divmod(step, number // size)
    return np.sort(_epoch_order(seed, epoch, number)[place * size : (place + 1) * size])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(number)


def pixel_values(pictures: np.ndarray, image_size: int, device: torch.device) -> Tensor:
    """Images (B, S, S, 3), uint8, as the vision tower reads them: (B, 3, image_size, image_size), normalized."""
    pixels = torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-1] != image_size:  # with antialias the kernel is the one of Pillow's bicubic
        pixels = functional.interpolate(pixels, (image_size, image_size), mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=device).view(1, 3, 1, 1)
    return (pixels - mean) / std


def scene_objects(rows: np.ndarray) -> tuple[SceneObject, ...]:
    """The objects of one scene from its rows (5, 6) in `Scenes.objects`."""
    items = []
    for color, shape, letter, x, y, size in rows[rows[:, 0] != NOTHING].tolist():
        name = None if letter == NOTHING else LETTERS[letter]
        items.append(SceneObject(_COLOR_NAMES[color], SHAPES[shape], (x, y, size), name))
    return tuple(items)


__all__ = [
    "MOST_OBJECTS",
    "NOTHING",
    "Scenes",
    "batch_rows",
    "cached_scenes",
    "draw_scenes",
    "file_in_place",
    "pixel_values",
    "scene_objects",
    "validation_scenes",
]
