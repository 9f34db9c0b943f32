"""What is asked: held-out scenes of the demo, JSON lines, or a folder of the `datasets` library."""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..demo import EVALUATION_SEEDS, IMAGE_SIZE, draw_scene, questions

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COLUMNS = ("image", "question", "answers")


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
            path relative to the file, `answers` perhaps a single string (or `answer`), `kind` optional; or a folder
            that `datasets` wrote (`save_to_disk`) or reads as an `imagefolder`, with the same columns.
        limit: The first so many rows.

    Raises:
        ValueError: A row that lacks something, with its number.
        OSError: A file that cannot be read.
        ImportError: A folder, and `datasets` is not installed.
    """
    path = Path(source)
    if path.is_dir():
        rows: Iterable[tuple[str, Any]] = _folder_rows(path, limit)
    elif path.is_file():
        rows = _file_rows(path, limit)
    else:
        raise FileNotFoundError(f"{source} is neither a file of JSON lines nor a folder.")
    samples = [_sample(where, row, path) for where, row in rows]
    if not samples:
        raise ValueError(f"{source} holds no rows.")
    return samples


def _file_rows(path: Path, limit: int | None) -> Iterable[tuple[str, Any]]:
    lines = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)]
    for number, line in [entry for entry in lines if entry[1].strip()][:limit]:
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with image, question and answers, got {row!r}.")
        yield where, row


def _folder_rows(path: Path, limit: int | None) -> Iterable[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("A folder of data needs the `datasets` library: pip install 'reccomp_hf[data]'.") from error
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        data = datasets.load_from_disk(str(path))
    else:
        data = datasets.load_dataset("imagefolder", data_dir=str(path))
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise ValueError(f"{path} holds the splits {', '.join(data)}; name the folder of one of them.")
        data = next(iter(data.values()))
    missing = [name for name in _COLUMNS[:2] if name not in data.column_names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(data.column_names)}.")
    if isinstance(data.features["image"], datasets.Image):
        # Decoded by us, so that a broken picture is told with its row.
        data = data.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(data if limit is None else data.select(range(min(limit, len(data))))):
        yield f"{path.name}, row {number}", row


def _sample(where: str, row: dict[str, Any], source: Path) -> Sample:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: the question is missing or empty, got {question!r}.")
    answers = row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answers must be a list of strings, not an empty one, got {answers!r}.")
    kind = row.get("kind")
    opened, name = _opener(row.get("image"), where, source)
    try:
        opened()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise ValueError(f"{where}: the picture {name} cannot be read: {reason}.") from error
    return Sample(opened, name, question.strip(), tuple(answers), "all" if kind is None else str(kind))


def _opener(image: Any, where: str, source: Path) -> tuple[Callable[[], Image.Image], str]:
    """What opens a row's picture, and a name for it."""
    if isinstance(image, str) and image:
        path = Path(image) if source.is_dir() else source.parent / image
        return lambda: _opened(path), image
    if isinstance(image, dict) and (image.get("bytes") or image.get("path")):  # an undecoded one of `datasets`
        data, name = image.get("bytes"), image.get("path")
        if data is None:
            return lambda: _opened(Path(str(name))), str(name)
        import hashlib
        import io

        digest = hashlib.sha256(data).hexdigest()[:16]
        return lambda: _opened(io.BytesIO(data)), f"{name or 'of'} {digest}"
    raise ValueError(f"{where}: image must be the path of a picture, got {image!r}.")


def _opened(file: Any) -> Image.Image:
    with Image.open(file) as image:
        # Palettes may hold transparency, which Pillow drops with a warning unless told so.
        return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


__all__ = ["Sample", "demo_samples", "load_samples", "normalize_answer"]
