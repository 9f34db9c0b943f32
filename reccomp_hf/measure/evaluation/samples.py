"""What is asked: held-out scenes of the demo, or rows of a file or folder with the answers."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.prompts import add_instruction, encode_rows
from ...data.rows import Rows, open_rows, picture_of, question_of, shown
from ...demo import EVALUATION_SEEDS, IMAGE_SIZE, draw_scene, questions

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COLUMNS = ("image", "question")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question about a picture.

    Attributes:
        image: The picture, or what opens it.
        picture: Names the picture; questions with one name are resampled together.
        question: Not empty.
        answers: Any of them is right; one or more.
        kind: Of question; accuracy is told for every kind.
        box: (left, top, right, bottom) of what is asked about as shares of the picture, where that is known.
    """

    image: Image.Image | Callable[[], Image.Image] = dataclasses.field(repr=False)
    picture: str
    question: str
    answers: tuple[str, ...]
    kind: str = "all"
    box: tuple[float, float, float, float] | None = None

    def open(self) -> Image.Image:
        """The picture in RGB."""
        image = self.image if isinstance(self.image, Image.Image) else self.image()
        return image if image.mode == "RGB" else image.convert("RGB")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, the articles a, an and the, and white space at the ends or doubled."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def demo_samples(limit: int | None = 2000, skip: int = 0) -> list[Sample]:
    """Questions on the demo's evaluation scenes, which no demo model was trained on.

    Args:
        limit: How many questions; the last scene may lack some of its own.
        skip: Scenes to pass over, for choosing settings on other scenes than those that are reported.

    Raises:
        ValueError: Not a positive limit, or more than there are scenes.
    """
    if limit is None or limit < 1 or not 0 <= skip < len(EVALUATION_SEEDS):
        raise ValueError(f"The demo's questions need a limit >= 1 and a skip >= 0, got {limit} and {skip}.")
    samples: list[Sample] = []
    for seed in EVALUATION_SEEDS[skip:]:
        if len(samples) >= limit:
            break
        scene = draw_scene(seed)
        for asked in questions(scene, seed):
            box = None if asked.object_index is None else _shares(scene.objects[asked.object_index].box)
            samples.append(Sample(scene.image, str(seed), asked.text, (asked.answer,), asked.kind, box))
    return samples[:limit]


def _shares(box: tuple[int, int, int]) -> tuple[float, float, float, float]:
    x, y, size = box
    return x / IMAGE_SIZE, y / IMAGE_SIZE, (x + size) / IMAGE_SIZE, (y + size) / IMAGE_SIZE


def load_samples(source: str | Path, limit: int | None = None) -> list[Sample]:
    """Read questions and check all of them: every picture is opened once before any work is done.

    Args:
        source: A JSON-lines file with rows `{"image": path, "question": ..., "answers": [...], "kind": ...}`, the
            path relative to the file, `answers` perhaps a single string (or `answer`), `kind` optional; or a Parquet
            file or a folder with the same columns, see [`open_rows`].
        limit: The first so many rows.

    Raises:
        ValueError: A row that lacks something, with its number.
        OSError: A file that cannot be read.
        ImportError: A folder or a Parquet file, and `datasets` is not installed.
    """
    rows = open_rows(source, limit)
    rows.require(*_COLUMNS)
    return [_sample(rows, number) for number in range(len(rows))]


def _sample(rows: Rows, number: int) -> Sample:
    try:
        row = rows[number]
        question = question_of(row.get("question"))
        answers = row.get("answers", row.get("answer"))
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"answers must be a list of strings, not an empty one, got {shown(answers)}.")
        kind = row.get("kind")
        picture = picture_of(row.get("image"), rows.base)
        picture.open()
    except ValueError as error:
        raise ValueError(f"{rows.where(number)}: {error}") from error
    return Sample(picture.open, picture.name, question, tuple(answers), "all" if kind is None else str(kind))


def encode_samples(processor: Any, samples: Sequence[Sample], instruction: str = "") -> Any:
    """Encode a batch of samples, see [`encode_rows`]; an image that several of them share is opened once."""
    images = {name: sample.open() for name, sample in {sample.picture: sample for sample in samples}.items()}
    return encode_rows(
        processor,
        [[images[sample.picture]] for sample in samples],
        [add_instruction(sample.question, instruction) for sample in samples],
        [sample.question for sample in samples],
    )


__all__ = ["Sample", "demo_samples", "encode_samples", "load_samples", "normalize_answer"]
