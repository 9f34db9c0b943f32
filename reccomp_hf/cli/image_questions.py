"""An image and questions about it, for `reccomp-hf demo` and `plot`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_SEED = 1_000_000
"""The first of `EVALUATION_SEEDS` whose questions are all answered right with 16 tokens and with all 144."""
IMAGE_QUESTIONS = ("How many objects are there?", "Is there a red circle?", "What color is the square?")


@dataclasses.dataclass(frozen=True)
class ImageQuestions:
    """An image and questions about it.

    Attributes:
        image: RGB image.
        source: Description for the reader.
        questions: One or more.
        expected: An answer for every question, `None` where it is unknown.
        seed: Seed of a drawn scene, `None` for an image file.
    """

    image: Image.Image
    source: str
    questions: list[str]
    expected: list[str | None]
    seed: int | None


def scene_questions(seed: int | None = None, texts: list[str] | None = None) -> ImageQuestions:
    """Draw the scene of a seed; without `texts` it comes with its own questions."""
    from ..demo import draw_scene, questions

    seed = DEFAULT_SEED if seed is None else seed
    scene = draw_scene(seed)
    answers = {question.text: question.answer for question in questions(scene, seed)}
    texts = _checked(texts) or list(answers)
    objects = ", ".join(f"{item.color} {item.shape}" for item in scene.objects)
    source = f"drawn scene {seed}: {objects}"
    return ImageQuestions(scene.image, source, texts, [answers.get(text) for text in texts], seed)


def file_questions(path: str, texts: list[str] | None = None) -> ImageQuestions:
    """Read an image file of any size and mode; without `texts` it comes with `IMAGE_QUESTIONS`.

    Raises:
        OSError: It is missing or cannot be read as an image.
    """
    from ..data.pictures import open_picture

    try:
        image = open_picture(path)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise OSError(f"{path} cannot be read as an image: {reason}") from error
    texts = _checked(texts) or list(IMAGE_QUESTIONS)
    source = f"{path}, {image.width} x {image.height} pixels; the model sees its middle square at 96 x 96"
    return ImageQuestions(image, source, texts, [None] * len(texts), None)


def unreadable_note(processor: Any, texts: list[str]) -> list[str]:
    """A line for each question in a script that the text encoder has no words of: more tokens than characters."""
    tokenizer = processor.recovery_tokenizer
    if tokenizer is None:
        return []
    found = [text for text in texts if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > len(text)]
    return [f"Note: the text encoder has no words of the script of {text!r}; ask in English." for text in found]


def _checked(texts: list[str] | None) -> list[str] | None:
    if texts and not all(text.strip() for text in texts):
        raise ValueError("A question is empty: write one.")
    if texts and len(texts) > 2 and all(text.isascii() and len(text.split()) == 1 for text in texts):
        raise ValueError(f"{len(texts)} questions of one word each, {texts}: put each question in quotes.")
    return texts


__all__ = [
    "DEFAULT_SEED",
    "IMAGE_QUESTIONS",
    "ImageQuestions",
    "file_questions",
    "scene_questions",
    "unreadable_note",
]
