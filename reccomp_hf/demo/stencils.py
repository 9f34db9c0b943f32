"""Opacity masks of the demo's objects: the outline of every shape, and the letters of the signs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

SIGN = "sign"
"""The shape that carries a letter: a board that hangs straight."""

_CANVAS = 128  # stencils are drawn at this size (pixels), then rotated and scaled down
_RADIUS = _CANVAS / 2 - 4
_LETTER_CELL = 14  # canvas pixels per cell of a letter: its 5 x 7 cells fill 55 x 77 % of the board


@cache
def shape_opacity(shape: str, size: int, rotation: int) -> np.ndarray:
    """Mask (size, size) of a shape turned by `rotation` degrees, 0 outside to 1 inside."""
    return _mask(_STENCILS[shape], size, rotation)


@cache
def letter_opacity(letter: str, size: int) -> np.ndarray:
    """Mask (size, size) of the letter on a sign of that size, 0 for the board to 1 for ink."""

    def draw_letter(draw: ImageDraw.ImageDraw) -> None:
        rows = _GLYPHS[letter]
        top, left = (_CANVAS - len(rows) * _LETTER_CELL) // 2, (_CANVAS - len(rows[0]) * _LETTER_CELL) // 2
        for row, cells in enumerate(rows):
            for column, cell in enumerate(cells):
                if cell == "#":
                    x, y = left + column * _LETTER_CELL, top + row * _LETTER_CELL
                    draw.rectangle([x, y, x + _LETTER_CELL - 1, y + _LETTER_CELL - 1], fill=255)

    return _mask(draw_letter, size, rotation=0)


def _mask(draw_stencil: Callable[[ImageDraw.ImageDraw], None], size: int, rotation: int) -> np.ndarray:
    stencil = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw_stencil(ImageDraw.Draw(stencil))
    stencil = stencil.rotate(rotation, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(stencil, dtype=np.float64) / 255


# ---- shapes: coordinates run from -1 to 1 in both directions, y downwards ------------------------------------------


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


def _sign(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle(_at(-1, -1, 1, 1), fill=255)


_STENCILS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
    SIGN: _sign,
}
SHAPES = tuple(_STENCILS)
"""Names of the shapes, `SIGN` last."""


# ---- letters: no A and no I, which are words of their own; of the rest, eight that differ in many cells ------------

_GLYPHS = {
    "J": ("..###", "...#.", "...#.", "...#.", "...#.", "#..#.", ".##.."),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "N": ("#...#", "##..#", "##..#", "#.#.#", "#..##", "#..##", "#...#"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "P": ("####.", "#...#", "#...#", "####.", "#....", "#....", "#...."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "V": ("#...#", "#...#", "#...#", "#...#", ".#.#.", ".#.#.", "..#.."),
    "Z": ("#####", "....#", "...#.", "..#..", ".#...", "#....", "#####"),
}
LETTERS = tuple(_GLYPHS)
"""Letters that a sign may carry."""


__all__ = ["LETTERS", "SHAPES", "SIGN", "letter_opacity", "shape_opacity"]
