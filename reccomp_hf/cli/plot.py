"""`reccomp-hf plot`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..checkpoints.loading import load
from ..data.prompts import encode_rows
from ..measure.plot import plot_recovery
from .common import add_command, quiet, say
from .demo_panels import picture_file
from .models import add_model_options, check_kept, check_picture, fields_of


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    check_kept(arguments.image, arguments.output)
    picture = picture_file(arguments.image, arguments.question)
    with quiet(progress_bars=sys.stderr.isatty()):
        model, processor = load(arguments.model, fields_of(arguments), arguments.device, arguments.dtype)
        section = model.config.token_recovery
        if not section.enabled:
            raise ValueError("There is nothing to plot: token_recovery.enabled is false, and every token is read.")
        images = [[picture.image]] * len(picture.questions)
        inputs = encode_rows(processor, images, picture.questions, picture.questions).to(model.device, model.dtype)
        records = model.recover(**inputs)
        figure = plot_recovery(
            picture.image, records, processor=processor, questions=picture.questions, method=section.method
        )
        figure.savefig(arguments.output)
    for question, record in zip(picture.questions, records, strict=True):
        say(f"{int(record.counts.sum())} tokens for: {question}")
    say(f"Wrote {arguments.output}.")


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "draw which patches of a picture a checkpoint reads, and why",
        "Draws the picture as the model sees it, once for each question: framed patches are read as they are,\n"
        "tinted areas as one average each, dark ones not at all. No answer is generated.",
        ' ./llava-reccomp --image photo.jpg --question "What does the sign say?" "How many people are there?"',
        ' demo --image photo.jpg --question "Is there a red circle?" --preset paper --output paper.png',
    )
    command.add_argument("model", metavar="MODEL", help="a compressed checkpoint: folder, Hub id, or demo")
    command.add_argument("--image", metavar="FILE", required=True, help="the picture")
    command.add_argument(
        "--question", nargs="+", action="extend", required=True, metavar="TEXT", help="one or several questions"
    )
    command.add_argument(
        "--output", type=check_picture, default="reccomp-plot.png", metavar="FILE", help="what to write"
    )
    add_model_options(command)


__all__ = ["register", "run"]
