"""Captions and questions that CLIP is trained on, and the scenes that they are true of.

A text describes one kind of object: a triple of a color, a shape and a letter, each an index or `ANY`. It is true of a
scene that contains such an object.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...demo.scenes import COLORS, LETTERS, SHAPES, SIGN
from .data import NOTHING

ANY = -1
Kind = tuple[int, int, int]
"""Indices of a color, a shape and a letter, each possibly `ANY`."""

_SIGN_INDEX = SHAPES.index(SIGN)
_COLOR_NAMES = tuple(COLORS)
_HARD_NEGATIVES = 0.25  # share of the texts in which one word of an object was exchanged


def kinds() -> list[Kind]:
    """All kinds of objects that have a text."""
    colors, shapes = range(ANY, len(COLORS)), range(ANY, len(SHAPES))
    plain = [(color, shape, ANY) for color in colors for shape in shapes if (color, shape) != (ANY, ANY)]
    return plain + [(color, _SIGN_INDEX, letter) for color in colors for letter in range(len(LETTERS))]


def texts_about(kind: Kind) -> list[str]:
    """All texts about a kind of object; a text that is listed twice is drawn twice as often."""
    color, shape, letter = kind
    noun = "object" if shape == ANY else SHAPES[shape]
    if color != ANY:
        noun = f"{_COLOR_NAMES[color]} {noun}"
    indefinite = f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
    if letter != ANY:
        name = LETTERS[letter].lower()
        texts = [f"{indefinite} with the letter {name}", f"the letter {name} on the {noun}"]
        return texts + ([f"the letter {name}", f"a photo of the letter {name}"] if color == ANY else [])
    texts = [indefinite, f"a photo of {indefinite}", f"the {noun}", f"is there {indefinite}?"]
    if color == ANY:
        texts += [f"what color is the {noun}?"] * 2
    if shape == ANY:
        texts += [f"what shape is the {noun}?"] * 2
    if shape == _SIGN_INDEX:
        texts += [f"what letter is on the {noun}?"] * 2
    return texts


class TextTable:
    """All texts, tokenized.

    Args:
        tokenizer: CLIP's tokenizer.

    Attributes:
        input_ids: (number of texts, longest), padded on the right.
        attention_mask: (number of texts, longest), 0 for padding.
        kinds: (number of texts, 3), the kind of object that each text describes.
    """

    def __init__(self, tokenizer: object) -> None:
        texts: list[str] = []
        about: list[Kind] = []
        self._rows: dict[Kind, range] = {}
        for kind in kinds():
            written = texts_about(kind)
            self._rows[kind] = range(len(texts), len(texts) + len(written))
            texts += written
            about += [kind] * len(written)
        encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")  # type: ignore[operator]
        self.input_ids: Tensor = encoded["input_ids"]
        self.attention_mask: Tensor = encoded["attention_mask"]
        self.kinds = np.array(about)

    def first(self, kind: Kind) -> int:
        """Row of the plainest text about a kind."""
        return self._rows[kind][0]

    def draw(self, objects: np.ndarray, number: int, rng: np.random.Generator, letters: float = 0.0) -> np.ndarray:
        """Draw texts about random objects of random scenes.

        Args:
            objects: (B, 5, 6), the scenes' objects.
            number: Number of texts.
            rng: Source of the random choices.
            letters: Share of the texts that are about a letter if their scene has one. Of the others, those about a
                sign still name its letter more often than not.

        Returns:
            Rows (number,) of the table.
        """
        scenes = rng.integers(len(objects), size=number)
        present = (objects[:, :, 0] != NOTHING).sum(1)
        rows = []
        for scene in scenes:
            item = objects[scene, rng.integers(present[scene])]
            signs = np.flatnonzero(objects[scene, :, 2] != NOTHING)
            to_read = bool(letters) and rng.random() < letters and len(signs) > 0
            if to_read:
                item = objects[scene, signs[rng.integers(len(signs))]]
            color, shape, letter = (int(index) for index in item[:3])
            available = self._rows[_draw_kind((color, shape, letter), to_read, rng)]
            rows.append(available[rng.integers(len(available))])
        return np.array(rows)


def _draw_kind(kind: Kind, to_read: bool, rng: np.random.Generator) -> Kind:
    """Drop some properties of an object, after exchanging one of them in some texts."""
    color, shape, letter = kind
    if rng.random() < _HARD_NEGATIVES:
        exchanged = rng.integers(2 if letter == NOTHING else 3)
        if exchanged == 0:
            color = int(rng.integers(len(COLORS)))
        elif exchanged == 1 and letter == NOTHING:
            shape = int(rng.integers(len(SHAPES)))
        else:
            letter = int(rng.integers(len(LETTERS)))
    names_letter, detail = rng.random() < 0.6, rng.random()
    if letter != NOTHING and (names_letter or to_read):
        return (ANY if detail < 0.4 else color), shape, letter
    if detail < 0.55:
        return color, shape, ANY
    return (color, ANY, ANY) if detail < 0.7 else (ANY, shape, ANY)


def matches(objects: np.ndarray, about: np.ndarray) -> np.ndarray:
    """Mask of the objects that a text describes: (B, 5, 6) and (T, 3) -> (B, 5, T), bool."""
    found = objects[:, :, None, :3]
    wanted = about[None, None]
    return ((wanted == ANY) | (found == wanted)).all(-1) & (found[..., 0] != NOTHING)


def truths(objects: np.ndarray, about: np.ndarray) -> Tensor:
    """Truth of every text for every scene: (B, 5, 6) and (T, 3) -> (B, T), float 0 or 1."""
    return torch.from_numpy(matches(objects, about).any(1)).float()


__all__ = ["ANY", "Kind", "TextTable", "kinds", "matches", "texts_about", "truths"]
