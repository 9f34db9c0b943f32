"""`reccomp-hf demo`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..configuration_reccomp import PRESETS
from ..demo import command as demo
from .common import add_command, quiet, say


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    if arguments.image is None:
        picture = demo.drawn_picture(arguments.seed, arguments.question)
    else:
        picture = demo.picture_file(arguments.image, arguments.question)
    with quiet(), demo.checkpoint(arguments.preset, arguments.budget, arguments.output) as folder:
        if not arguments.json:
            say(f"Picture: {picture.source}")
            say(f"Model:   this package's small LLaVA and CLIP, preset {arguments.preset}; nothing is downloaded", "")
        facts = {"preset": arguments.preset, "output": arguments.output, **demo.compare(folder, picture)}
        if arguments.output and picture.seed is not None:
            picture.image.save(folder / "scene.png")
    say(json.dumps(facts, indent=2) if arguments.json else demo.report(facts))


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "try it: a small trained model, with and without compression",
        "Converts the small checkpoints of this package, reloads the result and asks it about a drawn scene\n"
        "or a picture of yours, with compression and without. Takes seconds and downloads nothing.",
        "",
        " --seed 1000007 --budget 32",
        ' --image photo.jpg --question "Is there a red circle?"',
    )
    picture = command.add_mutually_exclusive_group()
    picture.add_argument("--image", metavar="FILE", help="a picture file instead of a drawn scene")
    picture.add_argument(
        "--seed", type=int, metavar="N", help="draw another scene; held-out ones are 1000000 to 1999999"
    )
    command.add_argument("--question", nargs="+", action="extend", metavar="TEXT", help="what to ask")
    command.add_argument("--preset", choices=PRESETS, default="balanced", help="settings to start from (balanced)")
    command.add_argument(
        "--budget",
        type=demo.budget,
        metavar="N|SHARE|dynamic",
        help="tokens per image, or their share, or as many as the picture asks for (balanced: 0.11, else dynamic)",
    )
    command.add_argument("--output", metavar="FOLDER", help="keep the converted checkpoint and the drawn scene here")
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["register", "run"]
