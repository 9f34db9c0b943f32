"""`reccomp-hf predict`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from ..engines.predict.defaults import DEFAULT_BATCH_SIZE, DEFAULT_ID_COLUMN, DEFAULT_NEW_TOKENS
from .options import (
    add_answer_options,
    add_checkpoint,
    add_command,
    add_cuda_graph,
    add_model_options,
    count,
    output_file,
    section_fields,
)
from .output import say

if TYPE_CHECKING:
    from ..engines.predict import Prediction


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.quiet import quiet
    from ..engines.predict import Columns, open_data, process_state

    with_vllm = arguments.engine == "vllm"
    if with_vllm:
        _check_vllm_options(arguments)
    state = process_state("cpu" if with_vllm else arguments.device)
    columns = Columns(arguments.image_column, arguments.question_column, arguments.id_column, arguments.question)
    options = {name: getattr(arguments, name) for name in ("limit", "overwrite", "batch_size", "max_new_tokens")}
    open_data(arguments.data, arguments.output, columns, **options)
    with quiet():
        options |= {"columns": columns, "instruction": arguments.instruction}
        try:
            done = _by_vllm(arguments, options) if with_vllm else _by_transformers(arguments, state, options)
        except KeyboardInterrupt:
            if state.is_main_process:
                kept = f"{arguments.output}.parts keeps the answers so far; the same command resumes."
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


def _by_transformers(arguments: argparse.Namespace, state: Any, options: dict[str, Any]) -> Prediction:
    from ..checkpoints.loading import load
    from ..engines.predict import predict

    source = (arguments.model, section_fields(arguments), _device(state, arguments), arguments.dtype)
    model, processor = load(*source, cuda_graph=arguments.cuda_graph)
    return predict(model, processor, arguments.data, arguments.output, **options)


def _by_vllm(arguments: argparse.Namespace, options: dict[str, Any]) -> Prediction:
    from ..checkpoints.loading import folder_with_weights
    from ..engines.vllm.prediction import check_one_process, predict_with_vllm
    from ..engines.vllm.starting import start_engine

    check_one_process()
    batch_size, folder = options.pop("batch_size"), folder_with_weights(arguments.model)
    llm = start_engine(folder, section_fields(arguments), arguments.dtype, batch_size)
    try:
        return predict_with_vllm(llm, arguments.data, arguments.output, **options)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _check_vllm_options(arguments: argparse.Namespace) -> None:
    """Refuse options that vLLM does not have.

    Raises:
        ValueError: One is given.
    """
    for name, given in (("--device", arguments.device is not None), ("--cuda-graph", arguments.cuda_graph)):
        if given:
            raise ValueError(
                f"{name} is an option of the engine transformers: vLLM chooses its device and records CUDA graphs by "
                "itself. With --engine vllm these fit: --preset, --budget, --set, --dtype, --batch-size, "
                "--max-new-tokens, --instruction, and those about the data and the output."
            )


def _device(state: Any, arguments: argparse.Namespace) -> str | None:
    """The device for the model: `--device`, or accelerate's choice for this one of several processes."""
    if state.num_processes == 1:
        return arguments.device
    if arguments.device not in (None, "cpu"):
        raise ValueError(
            f"--device {arguments.device} is for one process; with several, accelerate gives each its device."
        )
    return str(state.device)


def _text(done: Prediction) -> str:
    """The result in lines."""
    lines = [f"Wrote {done.output}: {done.answers} answers."]
    if done.visual_tokens is not None:
        tokens = f"{done.visual_tokens:.1f} of {done.uncompressed_visual_tokens:.1f} visual tokens"
        lines.append(f"A question read {tokens} on average.")
    processes = "1 process" if done.processes == 1 else f"{done.processes} processes"
    before = f"; {done.rows - done.new} had been answered before" if done.new < done.rows else ""
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
        "row, id, image, question, answer, visual_tokens, uncompressed_visual_tokens. A row that cannot be answered\n"
        "(missing or broken image, no question, invalid JSON, repeated id) gets row, id and error instead; the run\n"
        "continues, ends with status 0, and reports their number in a warning, or as errors with --json. If no row\n"
        "could be answered, the status is 2.\n\n"
        "Answers are kept in OUTPUT.parts until all are complete. After a kill the same command resumes from there,\n"
        "with any --batch-size and number of processes; it refuses to resume with other data, model or settings.",
        " questions.jsonl --model ./llava-reccomp --output answers.jsonl",
        " questions.jsonl --model me/llava-reccomp --engine vllm --batch-size 128 --output answers.jsonl",
        ' photos/ --question "What is shown?" --model demo --budget 0.1 --output answers.jsonl',
    )
    command.epilog += (
        "\n  accelerate launch --num_processes 8 -m reccomp_hf predict rows.parquet --model me/llava-reccomp "
        "--output answers.jsonl"
    )
    command.add_argument(
        "data",
        metavar="DATA",
        help="JSON lines, a Parquet file, or a folder of the datasets library (images, or a saved dataset); paths of "
        "images are relative to it",
    )
    add_checkpoint(command, "--model", required=True)
    command.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what answers; vllm needs a fixed budget and must be installed, and --batch-size is then the number of "
        "questions in one step",
    )
    command.add_argument("--output", required=True, type=output_file, metavar="FILE", help="file for the answers")
    command.add_argument("--overwrite", action="store_true", help="start over: remove the output, finished or not")
    command.add_argument("--question", metavar="TEXT", help="ask every row this question, in place of a column")
    command.add_argument(
        "--image-column", default="image", metavar="NAME", help="column with an image or a list of images"
    )
    command.add_argument("--question-column", default="question", metavar="NAME", help="column with the question")
    command.add_argument(
        "--id-column",
        metavar="NAME",
        help=f"column that identifies rows (default: {DEFAULT_ID_COLUMN} if it exists, else the row's number)",
    )
    command.add_argument("--limit", type=count, metavar="N", help="the first N rows (default: all)")
    add_answer_options(command, DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS)
    add_model_options(command)
    add_cuda_graph(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["register", "run"]
