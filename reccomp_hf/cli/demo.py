"""`reccomp-hf demo`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..core.settings import PRESETS
from .choices import CHECKPOINTS
from .image_questions import file_questions, scene_questions, unreadable_note
from .options import (
    UNSET,
    Budget,
    add_budget,
    add_command,
    add_preset,
    check_not_overwritten,
    output_image,
    preset_fields,
)
from .output import say

DEFAULT_BUDGET = 0.11  # of 144 tokens: 16


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from .demo_comparison import compare, draw
    from .demo_report import report

    check_not_overwritten(arguments.image, [arguments.output])
    fields = demo_fields(arguments.preset, arguments.budget)
    if arguments.image is None:
        picture = scene_questions(arguments.seed, arguments.question)
    else:
        picture = file_questions(arguments.image, arguments.question)
    with quiet():
        model, processor = load(arguments.model, fields, device="cpu")
        if not arguments.json:
            say(f"Image: {picture.source}")
            say(f"Model: {arguments.model}, preset {arguments.preset}; nothing is downloaded")
            say(*unreadable_note(processor, picture.questions), "")
        found, records = compare(model, processor, picture)
        facts = {"model": arguments.model, "preset": arguments.preset, "method": fields["method"], **found}
        facts["output"] = arguments.output
        draw(facts, picture, records, processor, arguments.output)
    say(json.dumps(facts, indent=2) if arguments.json else report(facts))


def demo_fields(preset: str, budget: Budget = UNSET) -> dict[str, Any]:
    """Fields of a preset; one with a fixed budget has `DEFAULT_BUDGET` unless another is given.

    Raises:
        ValueError: An unknown preset, or a budget that does not fit.
    """
    if budget is UNSET:
        return preset_fields(preset, **({"budget": DEFAULT_BUDGET} if "budget" in PRESETS.get(preset, ()) else {}))
    return preset_fields(preset, budget=budget)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "try a small trained model, with and without compression",
        "Asks the small model of this package about a drawn scene or an image of yours, with compression\n"
        "and without, and draws the patches that it read for each question. Takes seconds and downloads nothing.",
        "",
        " --seed 1000007 --budget 32",
        ' --image photo.jpg --question "Is there a red circle?"',
    )
    picture = command.add_mutually_exclusive_group()
    picture.add_argument("--image", metavar="FILE", help="an image file in place of a drawn scene")
    picture.add_argument(
        "--seed", type=int, metavar="N", help="draw another scene; held-out ones are 1000000 to 1999999"
    )
    command.add_argument("--question", nargs="+", action="extend", metavar="TEXT", help="one or several questions")
    add_preset(command, default="balanced")
    add_budget(
        command,
        "tokens per image, a share of its patches, or dynamic (default: "
        f"{DEFAULT_BUDGET} with the preset balanced or balanced-v1, else dynamic)",
    )
    command.add_argument(
        "--model",
        default=CHECKPOINTS[0],
        metavar="NAME",
        help=f"{CHECKPOINTS[0]}, {CHECKPOINTS[1]} (its CLIP was trained on whole images only), or a folder",
    )
    command.add_argument(
        "--output",
        type=output_image,
        default="reccomp-demo.png",
        metavar="FILE",
        help="image to write: the patches that were read",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["demo_fields", "register", "run"]
