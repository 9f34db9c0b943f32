"""An image, questions about it and their answers, for `reccomp-hf demo`, `ask` and `plot`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..core.tokenizing import token_ids

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


def encoded_questions(model: Any, processor: Any, picture: ImageQuestions) -> Any:
    """The questions as a batch on the model's device, a row each."""
    from ..data.prompts import encode_rows

    rows = [[picture.image]] * len(picture.questions)
    return encode_rows(processor, rows, picture.questions, picture.questions).to(model.device, model.dtype)


def answers_to(
    model: Any, processor: Any, inputs: Any, token_recovery: dict[str, Any], max_new_tokens: int
) -> tuple[list[str], Any]:
    """Greedy answers to a batch under some settings, and the output of `generate`.

    Args:
        model: A compressed LLaVA.
        processor: The model's processor.
        inputs: The output of `encoded_questions`.
        token_recovery: Fields of the section to override.
        max_new_tokens: Tokens of the longest answer.

    Raises:
        ValueError: A prompt leaves no position for an answer.
    """
    from ..engines.predict.batching import check_length, position_limit

    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        token_recovery=token_recovery,
        return_dict_in_generate=True,
    )
    section, positions = model.config.token_recovery.replace(token_recovery), inputs["attention_mask"].sum(-1)
    if output.visual_token_counts is not None and section.position_ids == "compact":
        placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(-1)
        positions = positions - placeholders + output.visual_token_counts + output.newline_counts
    check_length(int(positions.max()), position_limit(model.config))
    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts], output


def check_drawable(section: Any) -> None:
    """Refuse to draw which tokens were read where all are.

    Raises:
        ValueError: The section is switched off.
    """
    if not section.enabled:
        raise ValueError("There is nothing to plot: token_recovery.enabled is false, and every token is read.")


def unreadable_note(processor: Any, texts: list[str]) -> list[str]:
    """A line for each question in a script that the text encoder has no words of: more tokens than characters."""
    tokenizer = processor.recovery_tokenizer
    if tokenizer is None:
        return []
    lengths = map(len, token_ids(tokenizer, texts))
    found = [text for text, tokens in zip(texts, lengths, strict=True) if tokens > len(text)]
    return [f"Note: the text encoder has no words of the script of {text!r}; ask in English." for text in found]


def _checked(texts: list[str] | None) -> list[str] | None:
    from ..data.rows import question_of

    if texts and not all(text.strip() for text in texts):
        raise ValueError("A question is empty: write one.")
    for text in texts or []:
        question_of(text)
    if texts and len(texts) > 2 and all(text.isascii() and len(text.split()) == 1 for text in texts):
        raise ValueError(f"{len(texts)} questions of one word each, {texts}: put each question in quotes.")
    return texts


__all__ = [
    "DEFAULT_SEED",
    "IMAGE_QUESTIONS",
    "ImageQuestions",
    "answers_to",
    "check_drawable",
    "encoded_questions",
    "file_questions",
    "scene_questions",
    "unreadable_note",
]
