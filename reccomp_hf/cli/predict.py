"""`reccomp-hf predict`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..checkpoints.loading import load
from ..engines.predict import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_ID_COLUMN,
    DEFAULT_NEW_TOKENS,
    Columns,
    Prediction,
    open_data,
    predict,
    process_state,
)
from .common import add_command, quiet, say
from .models import add_model_options, check_file, fields_of


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    state = process_state(arguments.device)
    columns = Columns(arguments.image_column, arguments.question_column, arguments.id_column, arguments.question)
    options = {name: getattr(arguments, name) for name in ("limit", "overwrite", "batch_size", "max_new_tokens")}
    open_data(arguments.data, arguments.output, columns, **options)
    with quiet():
        model, processor = load(arguments.model, fields_of(arguments), _device(state, arguments), arguments.dtype)
        what = (model, processor, arguments.data, arguments.output)
        try:
            done = predict(*what, columns=columns, instruction=arguments.instruction, **options)
        except KeyboardInterrupt:
            if state.is_main_process:
                kept = f"{arguments.output}.parts keeps the answers so far; the same command goes on from them."
                sys.stderr.write(f"reccomp-hf: {kept}\n")
            raise
    state.destroy_process_group()
    if state.is_main_process:
        note = f'{done.errors} of {done.rows} rows could not be answered: see "error" in {done.output}.'
        if not done.answers:
            raise ValueError(note)
        say(json.dumps(dataclasses.asdict(done), indent=2) if arguments.json else _text(done))
        if done.errors:
            sys.stderr.write(f"reccomp-hf: warning: {note}\n")


def _device(state: Any, arguments: argparse.Namespace) -> str | None:
    """Where the model goes: where it was asked to, or where accelerate puts this one of several processes."""
    if state.num_processes == 1:
        return arguments.device
    if arguments.device not in (None, "cpu"):
        raise ValueError(
            f"--device {arguments.device} is for one process: of several, accelerate gives each its device."
        )
    return str(state.device)


def _text(done: Prediction) -> str:
    """What was done, for a reader."""
    lines = [f"Wrote {done.output}: {done.answers} answers."]
    if done.visual_tokens is not None:
        tokens = f"{done.visual_tokens:.1f} of {done.uncompressed_visual_tokens:.1f} visual tokens"
        lines.append(f"A question read {tokens} on average.")
    processes = "1 process" if done.processes == 1 else f"{done.processes} processes"
    before = f"; {done.rows - done.new} were there from before" if done.new < done.rows else ""
    lines.append(
        f"{done.new} rows in {done.seconds:.1f} s, {done.rows_per_second:.1f} a second ({processes}){before}."
    )
    return "\n".join(lines)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "answer every question of a file or folder, in one process or many",
        "Asks a checkpoint every question of the data and writes a line of JSON for each, in the order of the data:\n"
        "row, id, image, question, answer, visual_tokens, uncompressed_visual_tokens. A row that cannot be asked\n"
        "(no or a broken picture, no question, no JSON, an id that was there before) gets row, id and error instead;\n"
        "the run goes on, ends with status 0, and tells their number in a warning, in --json as errors. Where no\n"
        "row at all could be answered the status is 2.\n\n"
        "What is answered is kept in OUTPUT.parts until all is there. The same command after a kill goes on from it,\n"
        "with any --batch-size and number of processes, and refuses to with other data, model or settings.",
        " questions.jsonl --model ./llava-reccomp --output answers.jsonl",
        ' photos/ --question "What is shown?" --model demo --budget 0.1 --output answers.jsonl',
    )
    command.epilog += (
        "\n  accelerate launch --num_processes 8 -m reccomp_hf predict rows.parquet --model me/llava-reccomp "
        "--output answers.jsonl"
    )
    command.add_argument(
        "data",
        metavar="DATA",
        help="JSON lines, a Parquet file, or a folder of the datasets library (pictures, or a saved dataset); paths "
        "of pictures are relative to it",
    )
    command.add_argument(
        "--model", required=True, metavar="MODEL", help="a compressed checkpoint: folder, Hub id, demo or demo-global"
    )
    command.add_argument("--output", required=True, type=check_file, metavar="FILE", help="where the answers go")
    command.add_argument("--overwrite", action="store_true", help="start over: remove the output, finished or begun")
    command.add_argument("--question", metavar="TEXT", help="ask this of every row, in place of a column")
    command.add_argument("--image-column", default="image", metavar="NAME", help="a picture or a list of them (image)")
    command.add_argument("--question-column", default="question", metavar="NAME", help="what is asked (question)")
    command.add_argument(
        "--id-column",
        metavar="NAME",
        help=f"what tells rows apart ({DEFAULT_ID_COLUMN} where there is one, else the row's number)",
    )
    command.add_argument("--limit", type=int, metavar="N", help="the first N rows (all)")
    command.add_argument(
        "--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N", help=f"read at once ({DEFAULT_BATCH_SIZE})"
    )
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help=f"longest answer ({DEFAULT_NEW_TOKENS})",
    )
    command.add_argument(
        "--instruction", default="", metavar="TEXT", help="written below each question, CLIP does not read it"
    )
    add_model_options(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["register", "run"]
