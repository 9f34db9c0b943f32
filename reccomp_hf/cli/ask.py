"""`reccomp-hf ask`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .image_questions import answers_to, check_drawable, encoded_questions, file_questions, unreadable_note
from .options import (
    add_checkpoint,
    add_command,
    add_model_options,
    check_not_overwritten,
    count,
    output_image,
    section_fields,
)
from .output import say

NEW_TOKENS = 128


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..data.prompts import count_visual_tokens
    from ..measure.plot import plot_recovery

    check_not_overwritten(arguments.image, [arguments.plot])
    picture = file_questions(arguments.image, arguments.question)
    with quiet(progress_bars=sys.stderr.isatty()):
        model, processor = load(arguments.model, section_fields(arguments), arguments.device, arguments.dtype)
        section, questions = model.config.token_recovery, picture.questions
        if arguments.plot:
            check_drawable(section)
        inputs = encoded_questions(model, processor, picture)
        placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist()
        rows: list[dict[str, Any]] = [{"question": text} for text in questions]
        for name, override in [("answer", {})] + [("uncompressed", {"enabled": False})] * arguments.compare:
            answers, output = answers_to(model, processor, inputs, override, arguments.max_new_tokens)
            tokens = count_visual_tokens(output, [1] * len(rows), placeholders)
            for row, answer, read, most in zip(rows, answers, tokens, placeholders, strict=True):
                row[name] = answer
                if name == "answer":
                    row |= {"visual_tokens": read, "of": most}
        if arguments.plot:
            figure = plot_recovery(
                picture.image,
                model.recover(**inputs),
                processor=processor,
                questions=questions,
                answers=[row["answer"] or "nothing" for row in rows],
                method=section.method,
                title=arguments.model,
            )
            figure.savefig(arguments.plot)
    if arguments.json:
        say(json.dumps({"model": arguments.model, "image": arguments.image, "answers": rows}, indent=2))
        return
    say(*unreadable_note(processor, questions), *(_text(row) for row in rows))
    if arguments.plot:
        say(f"Wrote {arguments.plot}: the image under each question, with the patches that were read.")


def _text(row: dict[str, Any]) -> str:
    lines = [row["question"], f"  {row['answer'] or '(an empty answer)'}"]
    if "uncompressed" in row:
        lines.append(f"  uncompressed: {row['uncompressed'] or '(an empty answer)'}")
    return "\n".join([*lines, f"  {row['visual_tokens']} of {row['of']} visual tokens were read"])


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "ask a checkpoint questions about an image",
        "Answers questions about one image, greedily, and prints how many visual tokens were read.",
        ' ./llava-reccomp photo.jpg "What does the sign say?" --compare --plot read.png',
        ' demo photo.jpg "Is there a red circle?" "What color is the square?" --budget 14',
    )
    add_checkpoint(command)
    command.add_argument("image", metavar="IMAGE", help="the image file")
    command.add_argument("question", nargs="+", metavar="QUESTION", help="one or several questions, each in quotes")
    command.add_argument("--compare", action="store_true", help="answer without compression, too")
    command.add_argument(
        "--plot", type=output_image, metavar="FILE", help="image to write: the patches that were read"
    )
    command.add_argument(
        "--max-new-tokens", type=count, default=NEW_TOKENS, metavar="N", help="tokens of the longest answer"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(command)


__all__ = ["register", "run"]
