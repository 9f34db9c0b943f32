"""Questions with their answers: on held-out scenes of the demo, or from the rows of a file or folder."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.pictures import upright_rgb
from ...data.prompts import add_instruction, encode_rows
from ...data.rows import Rows, open_rows, picture_of, preview, question_of
from ...demo import EVALUATION_SEEDS, IMAGE_SIZE, draw_scene, questions

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COLUMNS = ("image", "question")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question about an image.

    Attributes:
        image: The image, or a function that opens it.
        picture: The image's name; the bootstrap resamples all questions of one name as a unit.
        question: The question, not empty.
        answers: One or more answers, any of which is right; none where they are unknown.
        kind: Question category; accuracy is reported per category.
        box: (left, top, right, bottom) of the object asked about as shares of the image, or `None` if unknown.
    """

    image: Image.Image | Callable[[], Image.Image] = dataclasses.field(repr=False)
    picture: str
    question: str
    answers: tuple[str, ...]
    kind: str = "all"
    box: tuple[float, float, float, float] | None = None

    def open(self) -> Image.Image:
        """The image in RGB."""
        image = self.image if isinstance(self.image, Image.Image) else self.image()
        return image if image.mode == "RGB" else upright_rgb(image)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, the articles a, an and the, and white space at the ends or doubled."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def demo_samples(limit: int | None = 2000, skip: int = 0, seeds: range = EVALUATION_SEEDS) -> list[Sample]:
    """Questions on the demo's held-out scenes, which no demo model was trained on.

    Args:
        limit: Number of questions; some questions of the last scene may be left out.
        skip: Number of scenes to skip, so that settings can be chosen on other scenes than the reported ones.
        seeds: Seeds of the scenes; settings are chosen on those of `VALIDATION_SEEDS`.

    Raises:
        ValueError: The limit is not positive, or `skip` exceeds the number of scenes.
    """
    if limit is None or limit < 1 or not 0 <= skip < len(seeds):
        raise ValueError(f"The demo's questions need a limit >= 1 and a skip >= 0, got {limit} and {skip}.")
    samples: list[Sample] = []
    for seed in seeds[skip:]:
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


def load_samples(
    source: str | Path, limit: int | None = None, *, answered: bool = True, asked: str | None = None
) -> list[Sample]:
    """Read questions and check all of them: every image is opened once before any work starts.

    Args:
        source: A JSON-lines file with rows `{"image": path, "question": ..., "answers": [...], "kind": ...}`, the
            path relative to the file, `answers` a list or one string (or `answer`), `kind` optional; or a Parquet
            file or a folder with the same columns, see [`open_rows`].
        limit: Number of rows to read from the start; `None` for all.
        answered: Whether rows must have answers; otherwise they are not read.
        asked: One question for every row, in place of the column.

    Raises:
        ValueError: A row is incomplete or not valid; the message gives its number.
        OSError: A file cannot be read.
        ImportError: `source` is a folder or a Parquet file, and `datasets` is not installed.
    """
    rows = open_rows(source, limit)
    rows.require(*(name for name in _COLUMNS if asked is None or name != "question"))
    return [_sample(rows, number, answered, asked) for number in range(len(rows))]


def _sample(rows: Rows, number: int, answered: bool, asked: str | None) -> Sample:
    try:
        row = rows[number]
        question = question_of(row.get("question") if asked is None else asked)
        answers = _answers(row) if answered else ()
        kind = row.get("kind")
        picture = picture_of(row.get("image"), rows.base)
        picture.open()
    except ValueError as error:
        raise ValueError(f"{rows.where(number)}: {error}") from error
    return Sample(picture.open, picture.name, question, answers, "all" if kind is None else str(kind))


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    answers = row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be a list of strings, not an empty one, got {preview(answers)}.")
    return tuple(answers)


def encode_samples(processor: Any, samples: Sequence[Sample], instruction: str = "") -> Any:
    """Encode a batch of samples, see [`encode_rows`]; an image that several of them share is opened once."""
    images = {name: sample.open() for name, sample in {sample.picture: sample for sample in samples}.items()}
    return encode_rows(
        processor,
        [[images[sample.picture]] for sample in samples],
        [add_instruction(sample.question, instruction) for sample in samples],
        [sample.question for sample in samples],
    )


def with_encoded_images(model: Any, inputs: Mapping[str, Any], token_recovery: Any) -> dict[str, Any]:
    """The inputs of a call with images that the vision tower has read, for several calls about them.

    Args:
        model: A compressed LLaVA.
        inputs: The output of `encode_samples`, on the model's device.
        token_recovery: The fields that these calls will override, or a list of them; see `model.encode_images`.
    """
    others = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
    return {**others, "pixel_values": model.encode_images(**inputs, token_recovery=token_recovery)}


__all__ = ["Sample", "demo_samples", "encode_samples", "load_samples", "normalize_answer", "with_encoded_images"]
