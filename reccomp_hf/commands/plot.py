"""`reccomp-hf plot`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..configuration_reccomp import PRESETS, TokenRecoveryConfig
from ..demo.command import budget, picture_file
from ..evaluation.running import encode
from ..evaluation.samples import Sample
from ..visualization import plot_recovery
from .common import add_command, quiet, say, setting
from .models import DTYPES, check_kept, check_picture, load


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    check_kept(arguments.image, arguments.output)
    picture = picture_file(arguments.image, arguments.question)
    fields: dict[str, Any] = {}
    if arguments.preset:
        fields = TokenRecoveryConfig.from_preset(arguments.preset).to_dict()
        del fields["text_encoder_config"]  # it is the weights'
    fields |= {"budget": arguments.budget[0]} if arguments.budget else {}
    fields |= dict(arguments.set)
    with quiet(progress_bars=sys.stderr.isatty()):
        model, processor = load(arguments.model, fields, arguments.device, arguments.dtype)
        section = model.config.token_recovery
        if not section.enabled:
            raise ValueError("There is nothing to plot: token_recovery.enabled is false, and every token is read.")
        samples = [Sample(picture.image, arguments.image, question, ("",)) for question in picture.questions]
        inputs = encode(processor, samples, "").to(model.device, model.dtype)
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
    command.add_argument("--preset", choices=PRESETS, help="settings to start from (the checkpoint's own)")
    command.add_argument(
        "--budget",
        type=budget,
        metavar="N|SHARE|dynamic",
        help="tokens per image, their share, or as the picture asks",
    )
    command.add_argument(
        "--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help="one field; may be repeated"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (float32 on a CPU, else as they are)")


__all__ = ["register", "run"]
