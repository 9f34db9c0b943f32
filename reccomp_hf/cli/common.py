"""What the commands share: how one is declared, how it reads settings, and how it speaks."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from ..checkpoints.quiet import quiet
from ..core.methods.registry import get_method


def add_command(commands: Any, run: Callable[..., None], summary: str, description: str, *examples: str) -> Any:
    """Declare a command that is called as its module is, with its help, and return its parser."""
    name = run.__module__.rpartition(".")[2]
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="\n".join(["example:", *(f"  reccomp-hf {name}{example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    debug = "show the traceback of an error"
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
    command.set_defaults(run=run, prog=command.prog)
    return command


def setting(text: str) -> tuple[str, Any]:
    """`field=value` as a pair; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected field=value, got {text!r}")
    with contextlib.suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


def check_counts(arguments: argparse.Namespace, *options: str) -> None:
    """Refuse options below 1; `None` stands for one that was not given.

    Raises:
        ValueError: Which one, and what it was.
    """
    for option in options:
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}.")


def section_lines(facts: dict[str, Any]) -> list[str]:
    """The section for a reader."""
    encoder, settings = facts["token_recovery"]["text_encoder_config"], dict(facts["settings"])
    reads = (
        f"CLIP's, {encoder.get('max_position_embeddings', 77)} tokens at a time" if encoder else "none: visual only"
    )
    method = settings.pop("method")
    fields = [f"{name} {json.dumps(value)}" for name, value in settings.items()]
    return [
        line("model type", facts["model_type"]),
        line("method", ": ".join(filter(None, (method, get_method(method).source)))),
        line("settings", ", ".join(fields) or "the defaults"),
        line("question encoder", reads),
        line("visual tokens", facts["tokens_per_image"]["note"]),
    ]


def line(name: str, value: str) -> str:
    """A name and its value, wrapped for a terminal."""
    text = f"  {name.replace('_', ' '):<20}{value}"
    # A path stays in one piece, to be copied.
    return textwrap.fill(text, 100, subsequent_indent=" " * 22, break_on_hyphens=False, break_long_words=False)


def say(*lines: str) -> None:
    """Write lines to stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def picture_size(text: str) -> tuple[int, int]:
    """Read `WIDTHxHEIGHT`, for the command line."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected width x height as in 640x480, got {text!r}")
    return int(found[1]), int(found[2])


__all__ = ["add_command", "check_counts", "line", "picture_size", "quiet", "say", "section_lines", "setting"]
