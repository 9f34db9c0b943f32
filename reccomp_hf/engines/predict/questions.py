"""From rows of data to questions about pictures, the rows that are none, and batches of similar length."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...core.checks import is_tiled
from ...core.counting import compressed_tokens, picture_tokens
from ...data.rows import Picture, Rows, picture_of, question_of, shown

DEFAULT_ID_COLUMN = "id"

_TOKENIZED_AT_ONCE = 4096

Id = str | int | None
Batch = list[int]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where in a row things are.

    Attributes:
        image: A picture or a list of them.
        question: What is asked of them.
        id: What an answer is found by; `None` for the column `id` where there is one, else the row's number.
        asked: A question for every row, in place of the column.
    """

    image: str = "image"
    question: str = "question"
    id: str | None = None
    asked: str | None = None

    def require(self, rows: Rows) -> None:
        """Refuse rows that lack one.

        Raises:
            ValueError: A column is missing.
        """
        needed = [self.image, self.id, self.question if self.asked is None else None]
        hint = " Name others by --image-column, --question-column and --id-column, or ask all the same by --question."
        rows.require(*(name for name in needed if name is not None), hint=hint)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about the pictures of a row.

    Attributes:
        row: Its number in the data, from 0.
        id: As the data has it, or `row`.
        text: Not empty.
        reads: What of it CLIP reads: no answer instructions.
        pictures: One or more, not opened.
    """

    row: int
    id: Id
    text: str
    reads: list[str]
    pictures: tuple[Picture, ...]


class BadRowError(ValueError):
    """A row that cannot be asked.

    Attributes:
        id: The row's, `None` where it is not known.
    """

    def __init__(self, message: str, id: Id = None) -> None:
        super().__init__(message)
        self.id = id


class Questions:
    """The questions of a file or folder by row number.

    Args:
        rows: See [`open_rows`].
        columns: Where things are.
        processor: Of the model that is asked.

    Raises:
        ValueError: The question for every row is none.
    """

    def __init__(self, rows: Rows, columns: Columns, processor: Any) -> None:
        self.rows, self.columns, self._processor = rows, columns, processor
        if columns.asked is not None:
            self._text({})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Question:
        """Read a row; its pictures are opened later.

        Raises:
            BadRowError: It cannot be asked.
        """
        row_id: Id = None
        try:
            row = self.rows[number]
            row_id = self._id(row, number)
            text, reads = self._text(row)
            pictures = self._pictures(row)
        except ValueError as error:
            raise BadRowError(f"{self.rows.where(number)}: {error}", row_id) from error
        return Question(number, row_id, text, reads, pictures)

    def _id(self, row: dict[str, Any], number: int) -> str | int:
        name = self.columns.id or DEFAULT_ID_COLUMN
        if self.columns.id is None and name not in row:
            return number
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not _is_text(str(value)):
            raise ValueError(f"{name} must be a string or a whole number, got {shown(value)}.")
        return value

    def _text(self, row: dict[str, Any]) -> tuple[str, list[str]]:
        text = question_of(row.get(self.columns.question) if self.columns.asked is None else self.columns.asked)
        if not _is_text(text):
            raise ValueError(f"the question is no valid Unicode, got {shown(text)}.")
        if self._processor.image_token in text:
            raise ValueError(f"the question holds {self._processor.image_token}, which stands for a picture.")
        reads = self._processor.questions_of([{"role": "user", "content": text}])
        if not reads:
            raise ValueError(f"the question is an answer instruction alone, got {shown(text)}.")
        return text, reads

    def _pictures(self, row: dict[str, Any]) -> tuple[Picture, ...]:
        value = row.get(self.columns.image)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError("the row has no picture, got an empty list.")
        return tuple(picture_of(value, self.rows.base) for value in values)


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON may hold half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def error_line(row: int, error: BadRowError) -> str:
    """A line of the output for a row that has no answer."""
    return line_of({"row": row, "id": error.id, "error": str(error)})


def line_of(fields: dict[str, Any]) -> str:
    """A line of the output."""
    return json.dumps(fields, ensure_ascii=False) + "\n"


# ---- which rows are read together ----------------------------------------------------------------------------------


def batches(
    questions: Questions, model: Any, section: Any, processor: Any, batch_size: int
) -> tuple[list[Batch], dict[int, str]]:
    """Rows in batches of similar length, the longest first, and the lines of those that cannot be asked.

    A row's length is its text in tokens and what its pictures are about to become, for which the header of a picture
    is read where its size matters. The order is the same in every run.
    """
    lengths: dict[int, int] = {}
    wrong: dict[int, str] = {}
    visual = _picture_length(model.config, section)
    rows = _readable(questions, wrong)
    while chunk := list(itertools.islice(rows, _TOKENIZED_AT_ONCE)):
        texts = [question.text for question in chunk]
        ids = processor.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for question, tokens in zip(chunk, ids, strict=True):
            lengths[question.row] = len(tokens) + sum(map(visual, question.pictures))
    order = sorted(lengths, key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)], wrong


def _readable(questions: Questions, wrong: dict[int, str]) -> Iterator[Question]:
    """The questions that can be asked, as far as it shows before pictures are opened; lines of the others."""
    first: dict[Id, int] = {}
    for number in range(len(questions)):
        try:
            question = questions[number]
            if first.setdefault(question.id, number) != number:
                taken = questions.rows.where(first[question.id])
                raise BadRowError(
                    f"{questions.rows.where(number)}: the id {question.id!r} is that of {taken}.", question.id
                )
        except BadRowError as error:
            wrong[number] = error_line(number, error)
        else:
            yield question


def _picture_length(config: Any, section: Any) -> Callable[[Picture], int]:
    """About how many tokens a picture becomes, newlines included."""
    side = config.vision_config.image_size
    share = compressed_tokens(config, section, (side, side)) / picture_tokens(config, (side, side))[1]
    fixed = section.budget if section.enabled and isinstance(section.budget, int) else None
    tiled = is_tiled(config)

    @functools.lru_cache(maxsize=4096)
    def of_size(size: tuple[int, int]) -> int:
        _, patches, newlines = picture_tokens(config, size)
        return newlines + (round(share * patches) if fixed is None else min(fixed, patches))

    return lambda picture: of_size((tiled and picture.size()) or (side, side))


def opened(questions: Questions, batch: Sequence[int]) -> tuple[list[Question], list[list[Any]], dict[int, str]]:
    """The questions of a batch, their pictures opened, and the lines of rows whose pictures cannot be read."""
    asked, pictures, wrong = [], [], {}
    for number in batch:
        question = questions[number]
        try:
            images = [picture.open() for picture in question.pictures]
        except ValueError as error:
            message = f"{questions.rows.where(number)}: {error}"
            wrong[number] = error_line(number, BadRowError(message, question.id))
        else:
            asked.append(question)
            pictures.append(images)
    return asked, pictures, wrong


__all__ = [
    "BadRowError",
    "Batch",
    "Columns",
    "Id",
    "Question",
    "Questions",
    "batches",
    "error_line",
    "line_of",
    "opened",
]
