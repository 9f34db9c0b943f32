"""Loading the model that a command is given by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints.loading import DTYPES
from ..core.configuration import TokenRecoveryConfig
from ..core.settings import PRESETS
from .common import setting
from .demo_panels import budget


def add_model_options(command: Any) -> None:
    """Declare how a checkpoint is loaded and which of its settings are others, see `fields_of`."""
    command.add_argument("--preset", choices=PRESETS, help="settings to start from (the checkpoint's own)")
    command.add_argument(
        "--budget",
        type=budget,
        metavar="N|SHARE|dynamic",
        help="tokens per image, their share, or as the picture asks",
    )
    command.add_argument(
        "--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help="one field; may be repeated"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (float32 on a CPU, else as they are)")


def fields_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `token_recovery` that the options override."""
    fields: dict[str, Any] = {}
    if arguments.preset:
        fields = TokenRecoveryConfig.from_preset(arguments.preset).overridable()
    fields |= {"budget": arguments.budget[0]} if arguments.budget else {}
    return fields | dict(arguments.set)


def check_picture(path: str) -> str:
    """For argparse: a file to write a picture to, whose folder is there and whose ending names a format."""
    endings = (".png", ".pdf", ".svg", ".jpg", ".webp")
    if not Path(path).is_dir() and not path.lower().endswith(endings):
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(endings)}, got {path!r}")
    return check_file(path)


def check_kept(source: str | None, *outputs: str | None) -> None:
    """Refuse to write over what is read.

    Raises:
        ValueError: An output is the source.
    """
    for output in filter(None, outputs):
        if source is not None and Path(source).exists() and Path(output).exists() and Path(output).samefile(source):
            raise ValueError(f"{output} is what is read, and would be written over: name another file to write.")


def check_file(path: str) -> str:
    """For argparse: a file to write, whose folder is there."""
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, expected a file")
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {path} does not exist")
    return path


__all__ = ["add_model_options", "check_file", "check_kept", "check_picture", "fields_of"]
