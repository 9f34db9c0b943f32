"""Rows of a data file or folder (JSON lines, Parquet, or a data set of the `datasets` library), and their images."""

from __future__ import annotations

import abc
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from .pictures import open_picture, picture_size
from .tables import read_folder, read_parquet

_PARQUET = b"PAR1"  # magic bytes
_LONGEST_PREVIEW = 80  # characters of a value in a message
_LONGEST_PATH = 4096  # characters, as on Linux
_LONGEST_QUESTION = 200_000  # characters, several times as many as the positions of any LLaVA hold
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Rows(abc.ABC):
    """Rows by number from 0, each read on access.

    Attributes:
        name: Name of the file or folder, for messages.
        base: The folder that relative image paths start from.
        columns: Names of the columns; for JSON lines, the keys that occur in any line.
    """

    name: str
    base: Path
    columns: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abc.abstractmethod
    def __getitem__(self, number: int) -> dict[str, Any]:
        """Read a row; a line that is not valid raises a ValueError that does not name the place."""

    @abc.abstractmethod
    def where(self, number: int) -> str:
        """The name of a row for messages."""

    def require(self, *names: str, hint: str = "") -> None:
        """Refuse data that lacks a column.

        Args:
            *names: Names of the columns.
            hint: Advice to append to the message.

        Raises:
            ValueError: A column is missing, or no line is a valid row.
        """
        if not self.columns:
            try:
                self[0]
            except ValueError as error:
                advice = "No line is a valid row: write one JSON object per line."
                raise ValueError(f"{self.where(0)}: {error} {advice}") from error
        missing = [name for name in names if name not in self.columns]
        if missing:
            known = ", ".join(self.columns) or "none"
            raise ValueError(f"{self.name} has no column {missing[0]!r}; its columns are {known}." + hint)


class _Lines(Rows):
    """A file of JSON lines; blank lines are skipped."""

    def __init__(self, path: Path, limit: int | None) -> None:
        self.name, self.base = _printable(path.name), path.parent
        lines = enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
        self._lines = [entry for entry in lines if entry[1].strip()][:limit]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[number][1].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, got {preview(row)}.")
        return row

    def where(self, number: int) -> str:
        return f"{self.name}, line {self._lines[number][0]}"

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        names: dict[str, None] = {}
        for number in range(len(self)):
            try:
                names |= dict.fromkeys(self[number])
            except ValueError:
                continue
        return tuple(names)


class _Table(Rows):
    """A data set as Arrow stores it: images are decoded here, so that the error for a broken one names its row."""

    def __init__(self, data: Any, path: Path, limit: int | None) -> None:
        self.name, self.base = _printable(path.name), path if path.is_dir() else path.parent
        self._data = data.with_format("arrow")
        self._count = len(data) if limit is None else min(limit, len(data))
        self.columns = tuple(data.column_names)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self._data[number].to_pylist()[0]
        except Exception as error:  # a time that Python has no date for, for example
            raise ValueError(f"the row cannot be read ({' '.join(str(error).split())}).") from error

    def where(self, number: int) -> str:
        return f"{self.name}, row {number}"


def open_rows(source: str | Path, limit: int | None = None) -> Rows:
    """Open data without reading images.

    Args:
        source: A file of JSON lines; a Parquet file; or a folder that `datasets` wrote (`save_to_disk`) or reads as
            an `imagefolder`. For Parquet files and image folders `datasets` keeps an Arrow copy in its cache.
        limit: Number of rows to read from the start; `None` for all.

    Raises:
        ValueError: There are no rows or several splits, `datasets` cannot read the data, or `source` is an image, a
            pipe or a device.
        OSError: A file cannot be read.
        ImportError: `source` is a folder or a Parquet file, and `datasets` is not installed.
    """
    path = existing_path(source)
    if path.is_dir():
        rows: Rows = _Table(read_folder(path), path, limit)
    elif not path.is_file():
        raise ValueError(f"{source} is neither a regular file nor a folder; write the rows to a file first.")
    elif _is_picture(path):
        raise ValueError(
            f"{source} is a picture, expected questions: a file of JSON lines, a Parquet file or a folder of pictures."
        )
    elif _starts_with(path, _PARQUET):
        rows = _Table(read_parquet(path), path, limit)
    else:
        rows = _Lines(path, limit)
    if not len(rows):
        raise ValueError(f"{source} holds no rows.")
    return rows


def existing_path(source: str | Path) -> Path:
    """The path of a file or folder.

    Raises:
        ValueError: The name is empty or cannot be one.
        OSError: There is no such file or folder, or it cannot be reached.
    """
    if not str(source):
        raise ValueError("The name of the data is empty: name a file or folder.")
    try:
        Path(source).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{source}: no such file or folder.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{preview(str(source))} cannot be opened: {reason}.") from error
    return Path(source)


def _is_picture(path: Path) -> bool:
    try:
        picture_size(path)
    except Exception:  # not an image, or one that no reader would take
        return False
    return True


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


# ---- images --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a row, not opened yet.

    Attributes:
        source: The image file, or its bytes.
        path: The path in the data, `None` where the data holds bytes alone.
    """

    source: Path | bytes = dataclasses.field(repr=False)
    path: str | None

    @property
    def name(self) -> str:
        """A name that is equal for equal images."""
        if isinstance(self.source, Path):
            return str(self.path)
        return f"{self.path or 'of'} {hashlib.sha256(self.source).hexdigest()[:16]}"

    def identity(self) -> tuple[Any, ...]:
        """Values that change with the image: its resolved path, size and time, or a digest of its bytes."""
        if isinstance(self.source, bytes):
            return (hashlib.sha256(self.source).hexdigest(),)
        path = str(self.source)
        with contextlib.suppress(OSError, ValueError):  # missing, or not a path; `open` reports the reason
            path = os.path.realpath(path)
            status = os.stat(path)
            return path, status.st_size, status.st_mtime_ns
        return (path,)

    def open(self) -> Image.Image:
        """Read the image in RGB, upright, with sides of at least 8 pixels.

        Raises:
            ValueError: The image is missing or broken.
        """
        try:
            return open_picture(self._file())
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds of errors on a broken file
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = "no such file" if isinstance(error, FileNotFoundError) else reason
            raise ValueError(f"the picture {self.name} cannot be read: {reason}.") from error

    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels from the file's header, `None` where `open` would refuse it."""
        try:
            return picture_size(self._file())
        except Exception:  # `open` reports the reason
            return None

    def _file(self) -> Any:
        return self.source if isinstance(self.source, Path) else io.BytesIO(self.source)


def picture_of(value: Any, base: Path) -> Picture:
    """The image that a row's value refers to.

    Args:
        value: A path, bytes, or `{"bytes": ..., "path": ...}` as `datasets` stores images, one of the two not null.
        base: The folder that a relative path starts from.

    Raises:
        ValueError: The value has another type or is empty.
    """
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    path = path if isinstance(path, str) and path else None
    if path is not None and isinstance(value, dict) and Path(path).is_relative_to(base.absolute()):
        path = str(Path(path).relative_to(base.absolute()))  # `datasets` stores absolute paths
    if isinstance(data, bytes) and data:
        return Picture(data, path)
    if path is None or not _is_unicode(path):
        raise ValueError(f"image must be the path of a picture, got {preview(value)}.")
    if _URL.match(path):
        raise ValueError(f"image must be the path of a picture, got a URL, which is not opened: {preview(path)}.")
    if len(path) > _LONGEST_PATH:
        raise ValueError(f"image must be the path of a picture, got {len(path):,} characters: {preview(path)}.")
    return Picture(base / path, path)


def question_of(value: Any) -> str:
    """Check a row's question, and strip white space around it.

    Raises:
        ValueError: It is not a non-empty string of valid Unicode, or is too long for any model.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the question is missing or empty, got {preview(value)}.")
    if len(value) > _LONGEST_QUESTION:
        raise ValueError(
            f"the question may have {_LONGEST_QUESTION:,} characters, got {len(value):,}: {preview(value)}."
        )
    if not _is_unicode(value):
        raise ValueError(f"the question is not valid Unicode, got {preview(value)}.")
    return value.strip()


def id_of(value: Any, column: str = "id") -> str | int:
    """Check a row's id.

    Raises:
        ValueError: It is not a string of valid Unicode or an integer.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or not _is_unicode(str(value)):
        raise ValueError(f"{column} must be a string or an integer, got {preview(value)}.")
    return value


def check_unique_id(row_id: str | int, number: int, first: dict[str | int, int], rows: Rows) -> None:
    """Refuse an id that an earlier row has.

    Args:
        row_id: The id of a row.
        number: The row's number.
        first: Numbers of earlier rows by their ids; the row is added.
        rows: The data, which names rows in messages.

    Raises:
        ValueError: An earlier row has the id.
    """
    if (earlier := first.setdefault(row_id, number)) != number:
        raise ValueError(f"the id {preview(row_id)} is already the id of {rows.where(earlier)}.")


def _printable(name: str) -> str:
    """A file's name for messages: the system allows bytes in it that are not text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: a JSON string may contain half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def preview(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_PREVIEW else f"{text[:_LONGEST_PREVIEW]}..."


__all__ = [
    "Picture",
    "Rows",
    "check_unique_id",
    "existing_path",
    "id_of",
    "open_rows",
    "picture_of",
    "preview",
    "question_of",
]
