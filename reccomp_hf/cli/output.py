"""Output of the commands: lines on stdout, facts about a checkpoint, and files of results."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any


def say(*lines: str) -> None:
    """Write lines to stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def line(name: str, value: str) -> str:
    """A name and its value, wrapped for a terminal."""
    text = f"  {name.replace('_', ' '):<20}{value}"
    # A path stays in one piece, to be copied.
    return textwrap.fill(text, 100, subsequent_indent=" " * 22, break_on_hyphens=False, break_long_words=False)


def section_lines(facts: dict[str, Any]) -> list[str]:
    """The `token_recovery` section of a checkpoint's facts, see `describe`, in lines."""
    from ..core.methods.registry import get_method
    from ..core.rules import rule_text

    encoder, settings = facts["token_recovery"]["text_encoder_config"], dict(facts["settings"])
    reads = (
        f"CLIP's, {encoder.get('max_position_embeddings', 77)} tokens at a time" if encoder else "none: visual only"
    )
    method, rules = settings.pop("method"), settings.pop("rules", [])
    fields = [f"{name} {json.dumps(value)}" for name, value in settings.items()]
    return [
        line("model type", facts["model_type"]),
        line("method", ": ".join(filter(None, (method, get_method(method).source)))),
        line("settings", ", ".join(fields) or "the defaults"),
        *(line(f"rule {number}", rule_text(rule)) for number, rule in enumerate(rules)),
        line("question encoder", reads),
        line("visual tokens", facts["tokens_per_image"]["note"]),
    ]


def write_results(
    arguments: argparse.Namespace, facts: Callable[[], dict[str, Any]], figure: Callable[[], Any] | None = None
) -> None:
    """Write the files that `--json` and `--plot` name, and say which; without these options nothing."""
    plot = getattr(arguments, "plot", None)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(facts(), indent=2) + "\n", encoding="utf-8")
    if plot and figure is not None:
        figure().savefig(plot)
    written = [path for path in (arguments.json, plot) if path]
    if written:
        say("", f"Wrote {' and '.join(written)}.")


__all__ = ["line", "say", "section_lines", "write_results"]
