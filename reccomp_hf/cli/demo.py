"""`reccomp-hf demo`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..checkpoints.loading import load
from ..core.settings import PRESETS
from ..demo import CHECKPOINTS
from . import demo_panels as demo
from .common import add_command, quiet, say
from .models import check_kept, check_picture


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    check_kept(arguments.image, arguments.output)
    fields = demo.settings(arguments.preset, arguments.budget)
    if arguments.image is None:
        picture = demo.drawn_picture(arguments.seed, arguments.question)
    else:
        picture = demo.picture_file(arguments.image, arguments.question)
    with quiet():
        model, processor = load(arguments.model, fields, device="cpu")
        if not arguments.json:
            say(f"Picture: {picture.source}")
            say(f"Model:   {arguments.model}, preset {arguments.preset}; nothing is downloaded", "")
        found, records = demo.compare(model, processor, picture)
        facts = {"model": arguments.model, "preset": arguments.preset, "method": fields["method"], **found}
        facts["output"] = arguments.output
        demo.draw(facts, picture, records, processor, arguments.output)
    say(json.dumps(facts, indent=2) if arguments.json else demo.report(facts))


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "try it: a small trained model, with and without compression",
        "Asks the small model of this package about a drawn scene or a picture of yours, with compression\n"
        "and without, and draws what it read for each question. Takes seconds and downloads nothing.",
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
    command.add_argument(
        "--model",
        default=CHECKPOINTS[0],
        metavar="NAME",
        help=f"{' or '.join(CHECKPOINTS)} (its CLIP trained on whole pictures only), or a folder ({CHECKPOINTS[0]})",
    )
    command.add_argument(
        "--output",
        type=check_picture,
        default=demo.DEFAULT_OUTPUT,
        metavar="FILE",
        help=f"where to draw what was read ({demo.DEFAULT_OUTPUT})",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["register", "run"]
