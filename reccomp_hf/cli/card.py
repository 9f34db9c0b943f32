"""`reccomp-hf card`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..checkpoints.cards import render_card, write_card
from .common import add_command, quiet, say


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    settings = {
        "base_model": arguments.base_model,
        "license": arguments.license,
        "repo": arguments.repo,
        "measure": arguments.measure,
    }
    with quiet(progress_bars=sys.stderr.isatty()):
        if arguments.stdout:
            say(render_card(arguments.folder, **settings).rstrip("\n"))
            return
        path = write_card(arguments.folder, force=arguments.force, **settings)
    say(f"Wrote {path}.", f"Next: read it, then reccomp-hf push {arguments.folder} {arguments.repo or 'OWNER/NAME'}")


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "write a checkpoint's model card",
        "Writes README.md: metadata for the Hub, how to load, the settings explained, tokens measured on\n"
        "drawn scenes, estimated cost, limits. A card that a person edited is left as it is.",
        " ./llava-reccomp --base-model llava-hf/llava-1.5-7b-hf --base-model openai/clip-vit-large-patch14-336",
        " ./llava-reccomp --repo me/llava-reccomp --stdout",
    )
    command.add_argument("folder", metavar="FOLDER", help="a folder that `reccomp-hf convert` wrote")
    command.add_argument(
        "--base-model",
        action="append",
        metavar="ID",
        help="Hub id of what it was made of: the LLaVA, and given again the CLIP",
    )
    command.add_argument("--license", metavar="ID", help="the weights' licence, if the base model's is not known")
    command.add_argument("--repo", metavar="ID", help="where the card will stand: owner/name")
    command.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="count tokens on drawn scenes, or not; usually only where the count depends on the picture",
    )
    command.add_argument("--force", action="store_true", help="replace a card that was edited")
    command.add_argument("--stdout", action="store_true", help="print the card and write nothing")


__all__ = ["register", "run"]
