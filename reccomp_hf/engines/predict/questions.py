"""Questions about images, read from rows of data; a row that cannot be asked becomes a `BadRow`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image

from ...data.rows import Picture, Rows, check_unique_id, id_of, picture_of, preview, question_of
from .defaults import DEFAULT_ID_COLUMN

Id = str | int | None


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of the data.

    Attributes:
        image: Column with an image or a list of images.
        question: Column with the question about them.
        id: Column that identifies an answer; `None` for the column `id` where there is one, else the row's number.
        asked: One question for every row, in place of the column.
    """

    image: str = "image"
    question: str = "question"
    id: str | None = None
    asked: str | None = None

    def require(self, rows: Rows) -> None:
        """Refuse rows that lack a column.

        Raises:
            ValueError: A column is missing.
        """
        needed = [self.image, self.id, self.question if self.asked is None else None]
        hint = (
            " Name others with --image-column, --question-column and --id-column, or ask every row the same with "
            "--question."
        )
        rows.require(*(name for name in needed if name is not None), hint=hint)


@dataclasses.dataclass(frozen=True)
class RowQuestion:
    """A question about the images of a row.

    Attributes:
        row: The row's number in the data, from 0.
        id: The id in the data, or `row`.
        text: The question, not empty.
        clip_texts: The parts of it that CLIP reads, without answer instructions.
        pictures: One or more images, not opened.
    """

    row: int
    id: Id
    text: str
    clip_texts: list[str]
    pictures: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True)
class OpenedQuestion:
    """A question with its images in RGB."""

    question: RowQuestion
    images: list[Image.Image]


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be asked.

    Attributes:
        row: The row's number in the data, from 0.
        id: The id in the data, `None` where it could not be read.
        error: The reason, with the row's place in the data.
    """

    row: int
    id: Id
    error: str

    @property
    def line(self) -> str:
        """The row's line of the output."""
        return json_line(dataclasses.asdict(self))


class Questions:
    """The questions of a file or folder by row number.

    Args:
        rows: See [`open_rows`].
        columns: Columns of the data.
        processor: Processor of the model.

    Raises:
        ValueError: `columns.asked` is not a question that can be asked.
    """

    def __init__(self, rows: Rows, columns: Columns, processor: Any) -> None:
        self.rows, self.columns, self._processor = rows, columns, processor
        if columns.asked is not None:
            self._texts({})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> RowQuestion | BadRow:
        """Read a row without opening its images."""
        row_id: Id = None
        try:
            row = self.rows[number]
            row_id = self._id(row, number)
            text, clip_texts = self._texts(row)
            pictures = self._pictures(row)
        except ValueError as error:
            return self.bad_row(number, row_id, error)
        return RowQuestion(number, row_id, text, clip_texts, pictures)

    def __iter__(self) -> Iterator[RowQuestion | BadRow]:
        """All rows in order; a row that repeats an earlier id is bad."""
        first: dict[str | int, int] = {}
        for number in range(len(self)):
            question = self[number]
            if isinstance(question, RowQuestion) and question.id is not None:
                try:
                    check_unique_id(question.id, number, first, self.rows)
                except ValueError as error:
                    question = self.bad_row(number, question.id, error)
            yield question

    def pictures(self) -> Iterator[Picture]:
        """The images of all rows in order, not opened; rows without a valid one are left out."""
        for number in range(len(self)):
            with contextlib.suppress(ValueError):
                yield from self._pictures(self.rows[number])

    def open(self, number: int) -> OpenedQuestion | BadRow:
        """Read a row and open its images."""
        question = self[number]
        if isinstance(question, BadRow):
            return question
        try:
            return OpenedQuestion(question, [picture.open() for picture in question.pictures])
        except ValueError as error:
            return self.bad_row(number, question.id, error)

    def bad_row(self, number: int, row_id: Id, error: ValueError) -> BadRow:
        """A row with the reason why it cannot be asked."""
        return BadRow(number, row_id, f"{self.rows.where(number)}: {error}")

    def _id(self, row: dict[str, Any], number: int) -> str | int:
        name = self.columns.id or DEFAULT_ID_COLUMN
        if self.columns.id is None and name not in row:
            return number
        return id_of(row.get(name), name)

    def _texts(self, row: dict[str, Any]) -> tuple[str, list[str]]:
        """The question, and the parts of it that CLIP reads."""
        text = question_of(row.get(self.columns.question) if self.columns.asked is None else self.columns.asked)
        if self._processor.image_token in text:
            raise ValueError(f"the question contains {self._processor.image_token}, the placeholder of an image.")
        clip_texts = self._processor.questions_of([{"role": "user", "content": text}])
        if not clip_texts:
            raise ValueError(f"the question is only an answer instruction, got {preview(text)}.")
        return text, clip_texts

    def _pictures(self, row: dict[str, Any]) -> tuple[Picture, ...]:
        value = row.get(self.columns.image)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError("the row has no image, got an empty list.")
        return tuple(picture_of(value, self.rows.base) for value in values)


def json_line(fields: dict[str, Any]) -> str:
    """A line of the output."""
    return json.dumps(fields, ensure_ascii=False) + "\n"


__all__ = ["BadRow", "Columns", "Id", "OpenedQuestion", "Questions", "RowQuestion", "json_line"]
