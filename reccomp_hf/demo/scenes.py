"""Synthetic scenes for the demo checkpoints.

A scene is a 96 x 96 RGB picture of two to five objects on a cluttered background. The objects of one scene have
pairwise distinct colors, so that a color alone identifies an object. Up to two of them are signs, each with a letter
to read; the others have pairwise distinct shapes.

Every scene is a function of its seed alone. The objects are equal on every machine; pixels may differ by a grey level
or two between releases of Pillow, which rasterises and resamples the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .stencils import LETTERS, SHAPES, SIGN, letter_opacity, shape_opacity

IMAGE_SIZE = 96
"""Width and height of a scene, in pixels."""

CLOSE_UP_SIZE = 48
"""Width and height of a close-up, in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (40, 165, 50),
    "blue": (45, 75, 225),
    "yellow": (235, 220, 40),
    "purple": (140, 45, 175),
    "orange": (245, 140, 25),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
"""Name of a color -> mean (red, green, blue), each 0 to 255."""

TRAIN_SEEDS = range(0, 1_000_000)
"""Seeds of scenes that a demo model may be trained on."""

EVALUATION_SEEDS = range(1_000_000, 2_000_000)
"""Seeds of scenes for evaluation only."""

VALIDATION_SEEDS = range(2_000_000, 3_000_000)
"""Seeds of scenes for watching a training run: neither trained on nor used for a reported number."""

_PLAIN_SHAPES = tuple(shape for shape in SHAPES if shape != SIGN)
_OBJECT_COUNTS = (2, 5)  # lowest and highest number of objects
_SIGN_COUNTS = (0, 1, 1, 2)  # equally likely, but at least one object of a scene is not a sign
_OBJECT_SIZES = (22, 24, 26, 28, 30)  # side of an object's box, pixels
_SIGN_SIZES = (26, 28, 30)  # a letter is three quarters as high: 20 to 23 pixels
_ROTATIONS = (-12, -6, 0, 6, 12)  # degrees, counter-clockwise; a sign hangs straight
_DARK_INK, _LIGHT_INK = 10, 250  # grey levels of a letter
_DARKEST_BOARD = 120  # grey level of a board's color from which on its letter is dark
_COLOR_JITTER = 12.0  # standard deviation per channel of an object, grey levels
_PIXEL_NOISE = 7.0  # standard deviation per pixel and channel, grey levels
_PLACEMENT_ATTEMPTS = 100

_SCENE_STREAM = 11  # first word of the seed, so that scenes and questions draw independently


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        color: A key of `COLORS`.
        shape: An entry of `SHAPES`.
        box: (x, y, size) in pixels: left edge, upper edge, and the side of the square that the object fills.
        letter: An entry of `LETTERS` if the shape is `SIGN`, else None.
    """

    color: str
    shape: str
    box: tuple[int, int, int]
    letter: str | None = None


@dataclass(frozen=True)
class Scene:
    """An image with the objects in it.

    Attributes:
        image: RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
        objects: Two to five objects with distinct colors and boxes that do not overlap. At most two, and not all, are
            signs, which come first; the others have distinct shapes.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]


def draw_scene(seed: int) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: Non-negative integer, usually from `TRAIN_SEEDS` or `EVALUATION_SEEDS`.

    Returns:
        The scene; the same seed always gives the same objects in the same places.

    Raises:
        ValueError: If `seed` is negative.
    """
    rng = generator(_SCENE_STREAM, seed)
    return _render_scene(rng, _background(rng), _arrange_objects(rng))


def draw_close_up(seed: int) -> Scene:
    """Draw an image of one object, every other time a sign, for the training of a CLIP.

    Args:
        seed: Non-negative integer from `TRAIN_SEEDS`.

    Returns:
        An image of `CLOSE_UP_SIZE` x `CLOSE_UP_SIZE` pixels in the style of the scenes, and its object.

    Raises:
        ValueError: If `seed` is negative.
    """
    rng = generator(_SCENE_STREAM, seed)
    canvas = _background(rng)[:CLOSE_UP_SIZE, :CLOSE_UP_SIZE].copy()
    shape = SIGN if rng.integers(2) else _PLAIN_SHAPES[rng.integers(len(_PLAIN_SHAPES))]
    color = list(COLORS)[rng.integers(len(COLORS))]
    item = _place_object(color, shape, [], CLOSE_UP_SIZE, rng)
    return _render_scene(rng, canvas, () if item is None else (item,))


def _render_scene(rng: np.random.Generator, canvas: np.ndarray, objects: tuple[SceneObject, ...]) -> Scene:
    """Draw objects on a background (height, width, 3) of float grey levels."""
    for item in objects:
        _paint(canvas, item, rng)
    canvas += rng.normal(0.0, _PIXEL_NOISE, canvas.shape)
    return Scene(Image.fromarray(_to_uint8(canvas)), objects)


def generator(stream: int, seed: int) -> np.random.Generator:
    """A random generator for a seed and a purpose, its stream.

    Raises:
        ValueError: If `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"A seed must be 0 or more, got {seed}. Held-out scenes have the seeds 1000000 to 1999999.")
    return np.random.default_rng([stream, seed])


# ---- placement --------------------------------------------------------------------------------------------------


def _arrange_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Choose colors, shapes, letters and places. A scene that is full before its last object has fewer objects."""
    lowest, highest = _OBJECT_COUNTS
    count = int(rng.integers(lowest, highest + 1))
    signs = min(_SIGN_COUNTS[rng.integers(len(_SIGN_COUNTS))], count - 1)
    colors = rng.permutation(list(COLORS))[:count]
    shapes = [SIGN] * signs + list(rng.permutation(_PLAIN_SHAPES)[: count - signs])
    objects: list[SceneObject] = []
    for color, shape in zip(colors, shapes, strict=True):
        item = _place_object(str(color), str(shape), objects, IMAGE_SIZE, rng)
        if item is None:
            break
        objects.append(item)
    return tuple(objects)


def _place_object(
    color: str, shape: str, others: list[SceneObject], side: int, rng: np.random.Generator
) -> SceneObject | None:
    """Find a place among other objects in an image of `side` x `side` pixels; a sign gets its letter."""
    sizes = _SIGN_SIZES if shape == SIGN else _OBJECT_SIZES
    for _ in range(_PLACEMENT_ATTEMPTS):
        size = sizes[rng.integers(len(sizes))]
        x, y = (int(value) for value in rng.integers(0, side - size + 1, size=2))
        if not any(_overlap((x, y, size), other.box) for other in others):
            letter = LETTERS[rng.integers(len(LETTERS))] if shape == SIGN else None
            return SceneObject(color, shape, (x, y, size), letter)
    return None


def _overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    (x, y, size), (other_x, other_y, other_size) = one, other
    return x < other_x + other_size and other_x < x + size and y < other_y + other_size and other_y < y + size


# ---- rendering -------------------------------------------------------------------------------------------------


def _paint(canvas: np.ndarray, item: SceneObject, rng: np.random.Generator) -> None:
    """Blend an object into `canvas` (height, width, 3) in place."""
    x, y, size = item.box
    rotation = 0 if item.shape == SIGN else _ROTATIONS[rng.integers(len(_ROTATIONS))]
    color = np.clip(np.array(COLORS[item.color]) + rng.normal(0.0, _COLOR_JITTER, 3), 0, 255)
    region = canvas[y : y + size, x : x + size]
    region += shape_opacity(item.shape, size, rotation)[..., None] * (color - region)
    if item.letter is not None:
        region += letter_opacity(item.letter, size)[..., None] * (_ink(item.color) - region)


def _ink(board: str) -> int:
    """Grey level of a letter that contrasts with a board."""
    red, green, blue = COLORS[board]
    return _DARK_INK if 0.299 * red + 0.587 * green + 0.114 * blue >= _DARKEST_BOARD else _LIGHT_INK


def _background(rng: np.random.Generator) -> np.ndarray:
    """Grey (height, width, 3) with low-frequency noise in brightness and hue, and three to eight lines and dots."""
    level = rng.uniform(70, 140)
    brightness = _smooth_noise(6, 1, rng)
    hue = _smooth_noise(5, 3, rng)
    image = Image.fromarray(_to_uint8(level + 0.35 * brightness + 0.12 * hue))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 9)):
        _draw_clutter(draw, rng)
    return np.array(image, dtype=np.float64)


def _smooth_noise(cells: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Noise (height, width, channels) of about -127 to 128, interpolated from a coarse grid of `cells` x `cells`."""
    coarse = rng.integers(0, 256, (channels, cells, cells), dtype=np.uint8)
    fine = [Image.fromarray(c).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for c in coarse]
    return np.stack([np.asarray(channel, dtype=np.float64) for channel in fine], axis=-1) - 127


def _draw_clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw a line of one or two pixels' width, or a dot of one to three pixels' radius."""
    x, y = (int(value) for value in rng.integers(0, IMAGE_SIZE, size=2))
    red, green, blue = (int(value) for value in rng.integers(40, 200, size=3))
    if rng.random() < 0.5:
        right, down = (int(value) for value in rng.integers(-30, 31, size=2))
        draw.line([x, y, x + right, y + down], fill=(red, green, blue), width=int(rng.integers(1, 3)))
    else:
        radius = int(rng.integers(1, 4))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(red, green, blue))


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels, 0, 255).astype(np.uint8)


__all__ = [
    "CLOSE_UP_SIZE",
    "COLORS",
    "EVALUATION_SEEDS",
    "IMAGE_SIZE",
    "LETTERS",
    "SHAPES",
    "SIGN",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Scene",
    "SceneObject",
    "draw_close_up",
    "draw_scene",
    "generator",
]
