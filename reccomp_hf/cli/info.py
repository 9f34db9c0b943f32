"""`reccomp-hf info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_checkpoint, add_command
from .output import line, say, section_lines


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.info import describe, folder_of
    from ..checkpoints.quiet import quiet

    with quiet():
        facts = describe(folder_of(arguments.folder), arguments.folder)
    if arguments.json:
        say(json.dumps(facts, indent=2))
        return
    files, needed = facts["files"], facts["token_recovery"]["text_encoder_config"] is not None
    absent = "MISSING: the processor cannot read questions" if needed else "none, and none is needed"
    say(
        arguments.folder,
        *section_lines(facts),
        *(line(name, f"{count:>14,} parameters") for name, count in facts["parameters"].items()),
        line("dtype", ", ".join(facts["dtypes"]) or "unknown: no safetensors files here"),
        line("weight files", f"{len(files['weights'])}, {files['weight_bytes'] / 1e6:,.1f} MB"),
        line("recovery tokenizer", "present" if files["recovery_tokenizer"] else absent),
    )


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "show a checkpoint's settings, parameters and visual tokens",
        "Shows the settings, parameters and visual tokens of a compressed checkpoint. Reads its config and\n"
        "the headers of its weights; the weights of a Hub repository are not downloaded.",
        " demo",
        " ./llava-reccomp",
        " ./llava-reccomp --json",
    )
    add_checkpoint(command, "folder")
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["register", "run"]
