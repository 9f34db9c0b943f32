"""Questions about a scene, answered from its objects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .scenes import COLORS, SHAPES, SIGN, Scene, SceneObject, generator

QUESTION_KINDS = ("color", "shape", "exist", "count", "read")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
COUNT_QUESTION = "How many objects are there?"

_QUESTION_STREAM = 12  # first word of the seed, see `generator`


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one-word answer.

    Attributes:
        text: The question as the demo LLaVA was trained on it.
        answer: A color, a shape, "yes" or "no", or a number word, in lower case; for "read" a capital letter.
        kind: An entry of `QUESTION_KINDS`.
        object_index: Index in `Scene.objects` of the object that the answer depends on; None for a count and for "no".
    """

    text: str
    answer: str
    kind: str
    object_index: int | None


def questions(scene: Scene, seed: int) -> list[Question]:
    """Ask for a color, a shape, an existing object, a missing one, the number of objects and a sign's letter.

    Args:
        scene: The scene to ask about.
        seed: Non-negative integer that chooses the objects asked about, each uniformly. At least seven in ten of
            the missing objects share their color or their shape with an object of the scene.

    Returns:
        The questions in the order named above: six, or five for a scene without a sign.

    Raises:
        ValueError: If `seed` is negative.
    """
    rng = generator(_QUESTION_STREAM, seed)
    objects = scene.objects
    named = alone_in_shape(objects)
    signs = [index for index, item in enumerate(objects) if item.letter is not None]
    asked_shape, asked_present, decoy = (int(index) for index in rng.integers(len(objects), size=3))
    asked = [
        color_question(objects, named[rng.integers(len(named))]),
        shape_question(objects, asked_shape),
        present_question(objects, asked_present),
        absent_question(objects, decoy, rng),
        count_question(objects),
    ]
    if signs:
        asked.append(read_question(objects, signs[rng.integers(len(signs))]))
    return asked


def every_question(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> list[Question]:
    """Ask every question that a scene answers, once each, with as many missing objects as existing ones.

    The count and the letters come first, then the rest in random order.
    """
    everything = range(len(objects))
    first = [count_question(objects)]
    first += [read_question(objects, index) for index in everything if objects[index].letter is not None]
    rest = [color_question(objects, index) for index in alone_in_shape(objects)]
    rest += [shape_question(objects, index) for index in everything]
    rest += [present_question(objects, index) for index in everything]
    rest += [absent_question(objects, index, rng) for index in everything]
    return first + [rest[index] for index in rng.permutation(len(rest))]


def alone_in_shape(objects: tuple[SceneObject, ...]) -> list[int]:
    """Indices of the objects that are identified by their shape: all but two signs in one scene."""
    number = Counter(item.shape for item in objects)
    return [index for index, item in enumerate(objects) if number[item.shape] == 1]


def color_question(objects: tuple[SceneObject, ...], index: int) -> Question:
    """Ask for the color of an object whose shape is unique in the scene."""
    return Question(f"What color is the {objects[index].shape}?", objects[index].color, "color", index)


def shape_question(objects: tuple[SceneObject, ...], index: int) -> Question:
    """Ask for the shape of an object."""
    return Question(f"What shape is the {objects[index].color} object?", objects[index].shape, "shape", index)


def present_question(objects: tuple[SceneObject, ...], index: int) -> Question:
    """Ask whether an existing object is there."""
    return Question(_existence_text(objects[index].color, objects[index].shape), "yes", "exist", index)


def absent_question(objects: tuple[SceneObject, ...], decoy: int, rng: np.random.Generator) -> Question:
    """Ask whether a missing object is there: 35 % keep the decoy's color, 35 % its shape."""
    present = {(item.color, item.shape) for item in objects}
    while True:
        keep = rng.random()
        color = objects[decoy].color if keep < 0.35 else list(COLORS)[rng.integers(len(COLORS))]
        shape = objects[decoy].shape if 0.35 <= keep < 0.7 else SHAPES[rng.integers(len(SHAPES))]
        if (color, shape) not in present:
            return Question(_existence_text(color, shape), "no", "exist", None)


def count_question(objects: tuple[SceneObject, ...]) -> Question:
    """Ask for the number of objects."""
    return Question(COUNT_QUESTION, NUMBER_WORDS[len(objects)], "count", None)


def read_question(objects: tuple[SceneObject, ...], index: int) -> Question:
    """Ask for the letter on a sign.

    Raises:
        ValueError: If the object is not a sign.
    """
    letter = objects[index].letter
    if letter is None:
        raise ValueError(f"Only a {SIGN} has a letter, but object {index} is a {objects[index].shape}.")
    return Question(f"What letter is on the {objects[index].color} {SIGN}?", letter, "read", index)


def _existence_text(color: str, shape: str) -> str:
    article = "an" if color[0] in "aeiou" else "a"
    return f"Is there {article} {color} {shape}?"


__all__ = [
    "COUNT_QUESTION",
    "NUMBER_WORDS",
    "QUESTION_KINDS",
    "Question",
    "absent_question",
    "alone_in_shape",
    "color_question",
    "count_question",
    "every_question",
    "present_question",
    "questions",
    "read_question",
    "shape_question",
]
