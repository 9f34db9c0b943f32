"""The weight files of a checkpoint, found where transformers looks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .json_files import read_json

FORMATS = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
"""The single file and the index of shards of each format, in the order in which transformers looks for them."""


def _patterns(single: str) -> list[str]:
    """Patterns of the single file of a format and of its shards."""
    stem, dot, suffix = single.partition(".")
    return [single, f"{stem}-*{dot}{suffix}"]


SAFETENSORS, PICKLES = _patterns(SAFE_WEIGHTS_NAME), _patterns(WEIGHTS_NAME)
"""Patterns of all weight files that a repository may hold, by format."""
NO_WEIGHTS = "{} has no weights: neither model*.safetensors nor pytorch_model*.bin"
"""Message for a checkpoint without weights."""


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weight files that transformers would load from a folder.

    Attributes:
        folder: The folder.
        keys: Name of each file, present or not, and the keys that the index puts there; no keys for a single file, and
            no files for a folder without weights.
        safetensors: Whether the files are safetensors.
    """

    folder: Path
    keys: Mapping[str, frozenset[str]]
    safetensors: bool = False

    @classmethod
    def find(cls, folder: Path) -> WeightFiles:
        """The weight files of a folder.

        Raises:
            ValueError: The index is not valid JSON, or names no weights, or files elsewhere.
        """
        for single, index in FORMATS:
            if (folder / single).is_file():
                return cls(folder, {single: frozenset()}, safetensors=single == SAFE_WEIGHTS_NAME)
            if (folder / index).is_file():
                return cls(folder, _shards(folder / index), safetensors=single == SAFE_WEIGHTS_NAME)
        return cls(folder, {})

    @property
    def names(self) -> list[str]:
        """Names of the files, present or not."""
        return sorted(self.keys)

    @property
    def present(self) -> list[Path]:
        """Paths of the files that the folder holds."""
        return [self.folder / name for name in self.names if (self.folder / name).is_file()]

    @property
    def missing(self) -> list[str]:
        """Names of the files that the index names and the folder lacks."""
        return [name for name in self.names if not (self.folder / name).is_file()]

    @property
    def complete(self) -> bool:
        """Whether there are weights, and none of their files is missing."""
        return bool(self.keys) and not self.missing

    def describe_missing(self) -> str:
        """`n of its weight files, ... among them`, for messages."""
        return f"{len(self.missing)} of its weight files, {self.missing[0]} among them"


def shard_names(count: int) -> list[str]:
    """Names that transformers gives the safetensors files of a checkpoint of `count` files."""
    if count == 1:
        return [SAFE_WEIGHTS_NAME]
    stem, dot, suffix = SAFE_WEIGHTS_NAME.partition(".")
    return [f"{stem}-{number:05d}-of-{count:05d}{dot}{suffix}" for number in range(1, count + 1)]


def open_shard(path: Path) -> safe_open:
    """Open a safetensors file.

    Raises:
        ValueError: The file is not safetensors, is truncated, or is empty.
    """
    try:
        file = safe_open(path, framework="pt")
        empty = not file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it may be truncated; download or copy it again."
        ) from error
    if empty:
        raise ValueError(f"{path} holds no weights: download or copy it again.")
    return file


def _shards(index: Path) -> dict[str, frozenset[str]]:
    """The files that an index names, with the keys that it puts there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} names no weights: its weight_map is {weight_map!r}. Download or save it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{index} names {name!r}, which is not a file of its folder. Download or save it again.")
    return {name: frozenset(key for key in weight_map if weight_map[key] == name) for name in set(weight_map.values())}


__all__ = ["NO_WEIGHTS", "PICKLES", "SAFETENSORS", "WeightFiles", "open_shard", "shard_names"]
