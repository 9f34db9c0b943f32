"""Data that the `datasets` library reads: Parquet files, saved data sets and folders of pictures."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .shared_setting import SharedSetting


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{what} needs the `datasets` library: pip install 'reccomp_hf[data]'.") from error
    return datasets


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[Any]:
    """The `datasets` library, whose errors become a ValueError and whose log is silent meanwhile."""
    datasets = _datasets(what)
    try:
        with _SILENT:
            yield datasets
    except Exception as error:  # its readers raise all kinds for a damaged file
        root = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        reason = " ".join(str(root or error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as {what[0].lower()}{what[1:]}: {reason}") from error


def _silence() -> Callable[[], None]:
    from datasets import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    return functools.partial(logging.set_verbosity, before)


_SILENT = SharedSetting(_silence)


def read_parquet(path: Path) -> Any:
    """The rows of a Parquet file, as a data set.

    Raises:
        ValueError: The file is damaged or holds no rows.
        ImportError: `datasets` is not installed.
    """
    with _reading(path, "A Parquet file") as datasets:
        import pyarrow.parquet  # comes with datasets

        if not pyarrow.parquet.read_metadata(path).num_rows:
            raise ValueError("it holds no rows.")
        return datasets.load_dataset("parquet", data_files=str(path), split="train")


def read_folder(path: Path) -> Any:
    """The rows of a folder that `datasets` wrote or reads as an `imagefolder`, as a data set.

    Raises:
        ValueError: The folder is damaged, or holds no pictures or several splits.
        ImportError: `datasets` is not installed.
    """
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with _reading(path, "A folder of data") as datasets:
        read = (
            datasets.load_from_disk(str(path)) if saved else datasets.load_dataset("imagefolder", data_dir=str(path))
        )
        splits = read if isinstance(read, datasets.DatasetDict) else {"": read}
    if len(splits) != 1:
        raise ValueError(f"{path} holds the splits {', '.join(splits)}; name the folder of one of them.")
    return next(iter(splits.values()))


__all__ = ["read_folder", "read_parquet"]
