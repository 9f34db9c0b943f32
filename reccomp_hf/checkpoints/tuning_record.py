"""The record of tuning, which a checkpoint carries as `tuning.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.checks import check_supported
from ..core.configuration import TokenRecoveryConfig
from .json_files import read_json, write_json
from .processors import load_config

FILE = "tuning.json"
_CONFIG = "config.json"


def write_section(folder: Path, fields: Mapping[str, Any] | None, record: Mapping[str, Any]) -> list[Path]:
    """Put a tuned section into a checkpoint's config.json, and its record next to it.

    Args:
        folder: The folder of a compressed checkpoint.
        fields: Fields of the section; the text encoder's config stays.
        record: The measurements, as JSON values.

    Returns:
        The files that were written.

    Raises:
        ValueError: The folder holds no compressed checkpoint, or the fields are not valid or do not fit it.
        OSError: A file cannot be read or written.
    """
    path = folder / _CONFIG
    config = read_json(path)
    present = config.get("token_recovery")
    if fields is None or not isinstance(present, dict):
        raise ValueError(f"{path} has no token_recovery section to replace.")
    section = TokenRecoveryConfig.from_value(present).replace(fields)
    check_supported(load_config(folder), section)
    _replace(folder / FILE, {**record, "token_recovery": section.overridable()})
    _replace(path, {**config, "token_recovery": section.to_dict()})
    return [path, folder / FILE]


def tuned_sentence(folder: Path, section: TokenRecoveryConfig) -> str | None:
    """A card's sentence about tuning; `None` without a record, or if the section is not the one that was tuned."""
    try:
        record = read_json(folder / FILE)
        tuned = TokenRecoveryConfig.from_value(record["token_recovery"]).overridable()
        contenders, chosen = record["contenders"], record["chosen"]
        present, taken = (contenders[name] for name in (next(iter(contenders)), chosen))
        means = [f"{one['divergence']['value']:.3f} bits" for one in (taken, present)]
        asked = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["asked"].items())
        goal = f" ({asked})" if asked else ""
        sentence = (
            f"Its settings were chosen by `reccomp-hf tune`{goal} on {record['chosen_on']:,} questions without "
            f"answers. On {record['reported_on']:,} other questions their divergence from the uncompressed model was "
            f"{means[0]} at {taken['tokens']:.1f} visual tokens, that of the settings before {means[1]} at "
            f"{present['tokens']:.1f}; {taken['agreement']['value']:.1%} of the answers were the uncompressed model's."
        )
    except (FileNotFoundError, KeyError, StopIteration, TypeError, ValueError):
        return None  # without a record, or one that was edited by hand
    return sentence if tuned == section.overridable() else None


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_json(temporary, values)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["tuned_sentence", "write_section"]
