"""Synthetic scenes and questions for the demo checkpoints.

A scene is a 96 x 96 RGB picture of two to five objects on a cluttered background. The objects of one scene have
pairwise distinct colors and pairwise distinct shapes, so that a color or a shape alone identifies an object. The
distribution is the one that the demo checkpoints were trained on, without the handwritten digits that half of the
training objects carried.

Every scene is a function of its seed alone. The objects are equal on every machine; pixels may differ by a grey level
or two between releases of Pillow, which rasterises and resamples the shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
"""Width and height of a scene, in pixels."""

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
"""Seeds of scenes for evaluation only. The shipped checkpoints saw neither range: theirs came from another stream."""

QUESTION_KINDS = ("color", "shape", "exist", "count")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")

_OBJECT_COUNTS = (2, 5)  # lowest and highest number of objects
_OBJECT_SIZES = (20, 22, 24, 26)  # side of an object's box, pixels
_ROTATIONS = (-12, -6, 0, 6, 12)  # degrees, counter-clockwise
_COLOR_JITTER = 12.0  # standard deviation per channel of an object, grey levels
_PIXEL_NOISE = 7.0  # standard deviation per pixel and channel, grey levels
_PLACEMENT_ATTEMPTS = 100

_CANVAS = 128  # shapes are drawn at this size (pixels), then rotated and scaled down
_RADIUS = _CANVAS / 2 - 4

_SCENE_STREAM, _QUESTION_STREAM = 11, 12  # first words of the seeds, so that scenes and questions draw independently


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        color: A key of `COLORS`.
        shape: An entry of `SHAPES`.
        box: (x, y, size) in pixels: left edge, upper edge, and the side of the square that the object fills.
    """

    color: str
    shape: str
    box: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: RGB picture of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
        objects: Two to five objects with distinct colors, distinct shapes and boxes that do not overlap.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one-word answer.

    Attributes:
        text: The question as the demo LLaVA was trained on it.
        answer: A color, a shape, "yes" or "no", or a number word, in lower case.
        kind: An entry of `QUESTION_KINDS`.
        object_index: Index in `Scene.objects` of the object that the answer depends on; None for a count and a "no".
    """

    text: str
    answer: str
    kind: str
    object_index: int | None


def draw_scene(seed: int) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: Non-negative integer, usually out of `TRAIN_SEEDS` or `EVALUATION_SEEDS`.

    Returns:
        The scene; the same seed always gives the same objects in the same places.

    Raises:
        ValueError: If `seed` is negative.
    """
    rng = _generator(_SCENE_STREAM, seed)
    canvas = _background(rng)  # (96, 96, 3), float grey levels
    objects = _arrange_objects(rng)
    for item in objects:
        _paint(canvas, item, rng)
    canvas += rng.normal(0.0, _PIXEL_NOISE, canvas.shape)
    return Scene(Image.fromarray(_to_uint8(canvas)), objects)


def questions(scene: Scene, seed: int) -> list[Question]:
    """Ask five questions about a scene: a color, a shape, an existence ("yes"), an existence ("no") and the count.

    Args:
        scene: The scene to ask about.
        seed: Non-negative integer that chooses the objects asked about, each uniformly. At least seven in ten of
            the objects asked about in vain share their color or their shape with an object of the scene.

    Returns:
        The questions in the order named above.

    Raises:
        ValueError: If `seed` is negative.
    """
    rng = _generator(_QUESTION_STREAM, seed)
    objects = scene.objects
    asked_color, asked_shape, asked_present, decoy = (int(index) for index in rng.integers(len(objects), size=4))
    present = objects[asked_present]
    absent_color, absent_shape = _absent_pair(objects, objects[decoy], rng)
    return [
        Question(f"What color is the {objects[asked_color].shape}?", objects[asked_color].color, "color", asked_color),
        Question(
            f"What shape is the {objects[asked_shape].color} object?", objects[asked_shape].shape, "shape", asked_shape
        ),
        Question(_existence_text(present.color, present.shape), "yes", "exist", asked_present),
        Question(_existence_text(absent_color, absent_shape), "no", "exist", None),
        Question("How many objects are there?", NUMBER_WORDS[len(objects)], "count", None),
    ]


def _generator(stream: int, seed: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"A seed must be a non-negative integer, but got {seed}. Take one from EVALUATION_SEEDS.")
    return np.random.default_rng([stream, seed])


def _existence_text(color: str, shape: str) -> str:
    article = "an" if color[0] in "aeiou" else "a"
    return f"Is there {article} {color} {shape}?"


def _absent_pair(objects: tuple[SceneObject, ...], decoy: SceneObject, rng: np.random.Generator) -> tuple[str, str]:
    """Draw a color and a shape that no object combines: 35 % keep the decoy's color, 35 % its shape."""
    present = {(item.color, item.shape) for item in objects}
    while True:
        keep = rng.random()
        color = decoy.color if keep < 0.35 else list(COLORS)[rng.integers(len(COLORS))]
        shape = decoy.shape if 0.35 <= keep < 0.7 else SHAPES[rng.integers(len(SHAPES))]
        if (color, shape) not in present:
            return color, shape


# ---- where the objects stand ---------------------------------------------------------------------------------------


def _arrange_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Choose colors, shapes and places. A scene that is full before its last object has one object less."""
    lowest, highest = _OBJECT_COUNTS
    count = int(rng.integers(lowest, highest + 1))
    colors = rng.permutation(list(COLORS))[:count]
    shapes = rng.permutation(SHAPES)[:count]
    objects: list[SceneObject] = []
    for color, shape in zip(colors, shapes, strict=True):
        box = _free_box([item.box for item in objects], rng)
        if box is None:
            break
        objects.append(SceneObject(str(color), str(shape), box))
    return tuple(objects)


def _free_box(taken: list[tuple[int, int, int]], rng: np.random.Generator) -> tuple[int, int, int] | None:
    for _ in range(_PLACEMENT_ATTEMPTS):
        size = _OBJECT_SIZES[rng.integers(len(_OBJECT_SIZES))]
        x, y = (int(value) for value in rng.integers(0, IMAGE_SIZE - size + 1, size=2))
        if not any(_overlap((x, y, size), other) for other in taken):
            return x, y, size
    return None


def _overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    (x, y, size), (other_x, other_y, other_size) = one, other
    return x < other_x + other_size and other_x < x + size and y < other_y + other_size and other_y < y + size


# ---- how they look -------------------------------------------------------------------------------------------------


def _paint(canvas: np.ndarray, item: SceneObject, rng: np.random.Generator) -> None:
    """Blend an object into `canvas` (height, width, 3) in place."""
    x, y, size = item.box
    rotation = _ROTATIONS[rng.integers(len(_ROTATIONS))]
    opacity = _opacity(item.shape, size, rotation)[..., None]  # (size, size, 1)
    color = np.clip(np.array(COLORS[item.color]) + rng.normal(0.0, _COLOR_JITTER, 3), 0, 255)
    region = canvas[y : y + size, x : x + size]
    region += opacity * (color - region)


@cache
def _opacity(shape: str, size: int, rotation: int) -> np.ndarray:
    """Mask (size, size) of a shape, 0 outside to 1 inside."""
    stencil = Image.new("L", (_CANVAS, _CANVAS), 0)
    _STENCILS[shape](ImageDraw.Draw(stencil))
    stencil = stencil.rotate(rotation, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(stencil, dtype=np.float64) / 255


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


# ---- stencils: coordinates run from -1 to 1 in both directions, y downwards ---------------------------------------


def _at(*coordinates: float) -> list[float]:
    return [_CANVAS / 2 + _RADIUS * value for value in coordinates]


def _circle(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse(_at(-1, -1, 1, 1), fill=255)


def _square(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle(_at(-0.85, -0.85, 0.85, 0.85), fill=255)


def _triangle(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon(_at(0, -1, 1, 0.85, -1, 0.85), fill=255)


def _star(draw: ImageDraw.ImageDraw) -> None:
    corners: list[float] = []
    for index in range(10):
        reach, angle = (1.08, 0.46)[index % 2], index * pi / 5
        corners += [reach * sin(angle), -reach * cos(angle)]
    draw.polygon(_at(*corners), fill=255)


def _cross(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle(_at(-0.34, -1, 0.34, 1), fill=255)
    draw.rectangle(_at(-1, -0.34, 1, 0.34), fill=255)


def _ring(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse(_at(-1, -1, 1, 1), fill=255)
    draw.ellipse(_at(-0.58, -0.58, 0.58, 0.58), fill=0)


def _diamond(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon(_at(0, -1.05, 0.72, 0, 0, 1.05, -0.72, 0), fill=255)


def _heart(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse(_at(-1, -0.9, 0.04, 0.14), fill=255)
    draw.ellipse(_at(-0.04, -0.9, 1, 0.14), fill=255)
    draw.polygon(_at(-0.93, -0.12, 0.93, -0.12, 0, 1), fill=255)


_STENCILS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
}
SHAPES = tuple(_STENCILS)
"""Names of the shapes."""
