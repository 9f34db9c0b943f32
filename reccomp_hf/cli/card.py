"""`reccomp-hf card`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .choices import CHECKPOINTS
from .options import add_command
from .output import say


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.cards import render_card, write_card
    from ..checkpoints.info import folder_of
    from ..checkpoints.quiet import quiet

    settings = {
        "base_model": arguments.base_model,
        "license": arguments.license,
        "repo": arguments.repo,
        "measure": arguments.measure,
    }
    with quiet(progress_bars=sys.stderr.isatty()):
        if arguments.stdout:
            say(render_card(folder_of(arguments.folder), **settings).rstrip("\n"))
            return
        if arguments.folder in CHECKPOINTS and not Path(arguments.folder).is_dir():
            raise ValueError(
                f"{arguments.folder} is shipped with this package and has its card: --stdout prints one. To write a "
                "card, name the folder of a checkpoint of yours."
            )
        path = write_card(arguments.folder, force=arguments.force, **settings)
    say(f"Wrote {path}.", f"Next: read it, then reccomp-hf push {arguments.folder} {arguments.repo or 'OWNER/NAME'}")


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "write a checkpoint's model card",
        "Writes README.md: metadata for the Hub, how to load the checkpoint, its settings explained, tokens measured\n"
        "on drawn scenes, estimated cost, limits. A card that was edited by hand is not replaced.",
        " ./llava-reccomp --base-model llava-hf/llava-1.5-7b-hf --base-model openai/clip-vit-large-patch14-336",
        " ./llava-reccomp --repo me/llava-reccomp --stdout",
    )
    command.add_argument("folder", metavar="FOLDER", help="a folder that `reccomp-hf convert` wrote")
    command.add_argument(
        "--base-model",
        action="append",
        metavar="ID",
        help="Hub id of a source: the LLaVA, and repeated for the CLIP",
    )
    command.add_argument("--license", metavar="ID", help="licence of the weights, if the base model's is unknown")
    command.add_argument("--repo", metavar="ID", help="repository that the card is for: owner/name")
    command.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="count tokens on drawn scenes, or do not (default: only if the count depends on the image)",
    )
    command.add_argument("--force", action="store_true", help="replace a card that was edited by hand")
    command.add_argument("--stdout", action="store_true", help="print the card and write nothing")


__all__ = ["register", "run"]
