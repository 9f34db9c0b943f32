"""`reccomp-hf plot`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .image_questions import check_drawable, encoded_questions, file_questions, unreadable_note
from .options import (
    add_checkpoint,
    add_command,
    add_model_options,
    check_not_overwritten,
    output_image,
    section_fields,
)
from .output import say


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..measure.plot import plot_recovery

    check_not_overwritten(arguments.image, [arguments.output])
    picture = file_questions(arguments.image, arguments.question)
    with quiet(progress_bars=sys.stderr.isatty()):
        model, processor = load(arguments.model, section_fields(arguments), arguments.device, arguments.dtype)
        section = model.config.token_recovery
        check_drawable(section)
        say(*unreadable_note(processor, picture.questions))
        records = model.recover(**encoded_questions(model, processor, picture))
        figure = plot_recovery(
            picture.image,
            records,
            processor=processor,
            questions=picture.questions,
            method=section.method,
            title=f"{arguments.model}, {f'preset {arguments.preset}' if arguments.preset else section.method}",
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
        "draw which patches of an image a checkpoint reads, and why",
        "Draws the image as the model sees it, once for each question: framed patches are read as they are,\n"
        "tinted areas as one average each, dark ones not at all. No answer is generated.",
        ' ./llava-reccomp --image photo.jpg --question "What does the sign say?" "How many people are there?"',
        ' demo --image photo.jpg --question "Is there a red circle?" --preset paper --output paper.png',
    )
    add_checkpoint(command)
    command.add_argument("--image", metavar="FILE", required=True, help="the image file")
    command.add_argument(
        "--question", nargs="+", action="extend", required=True, metavar="TEXT", help="one or several questions"
    )
    command.add_argument(
        "--output", type=output_image, default="reccomp-plot.png", metavar="FILE", help="image to write"
    )
    add_model_options(command)


__all__ = ["register", "run"]
