"""`reccomp-hf tune`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .choices import CHECKPOINTS, TUNE_BATCH_SIZE, TUNE_CANDIDATES, TUNE_NEW_TOKENS
from .options import (
    add_answer_options,
    add_checkpoint,
    add_command,
    add_cuda_graph,
    add_device,
    add_dtype,
    add_json_file,
    add_settings,
    budget,
    check_not_overwritten,
    count,
    file_fields,
    output_file,
    output_image,
)
from .output import say, write_results

DEMO_DATA, DEMO_QUESTIONS = "demo", 200
_WORDS = (
    "present section: the checkpoint's own settings, at the budget that was asked for. divergence: how far the\n"
    "next tokens' probabilities along the answer are from the uncompressed model's, in bits; 0 is equal.\n"
    "agreement: the share of answers that are the uncompressed model's."
)
_FEW = 100  # questions below which a warning is printed


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    if arguments.apply is not None:
        _apply(arguments)
        return
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..checkpoints.tuning_record import write_section
    from ..measure.tuning import Goal, plot_tuning, tune

    goal = {name: getattr(arguments, name) for name in ("budget", "average", "agreement", "frontier")}
    goal |= {"dynamic": arguments.dynamic, "by_question": arguments.by_question}
    Goal(**goal)  # before anything is loaded
    if arguments.write:
        _check_folder(arguments.model, "--write")
    if arguments.write and arguments.frontier:
        raise ValueError("--frontier chooses no section, so there is nothing to write: name a --budget.")
    check_not_overwritten(arguments.data, [arguments.output, arguments.json, arguments.plot])
    samples = _samples(arguments)
    with quiet():
        where = {"device": arguments.device, "dtype": arguments.dtype, "cuda_graph": arguments.cuda_graph}
        model, processor = load(arguments.model, {}, **where)
        try:
            tuning = tune(
                model,
                processor,
                samples,
                **goal,
                candidates=arguments.candidates if arguments.candidates in TUNE_CANDIDATES else _names(arguments),
                shared=dict(arguments.set),
                output=arguments.output,
                overwrite=arguments.overwrite,
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                instruction=arguments.instruction,
                seed=arguments.seed,
            )
        except FileExistsError as error:
            apply = f"reccomp-hf tune {arguments.model} --apply {arguments.output}"
            raise FileExistsError(f"{error} To put its section into config.json: {apply}") from error
        except KeyboardInterrupt:
            if arguments.output:
                kept = f"{arguments.output}.parts keeps the measurements so far; the same command resumes."
                sys.stderr.write(f"reccomp-hf: {kept}\n")
            raise
    chosen_on = f"{arguments.model}: chosen on {tuning.chosen_on} questions of {arguments.data} without answers"
    say(f"{chosen_on}, reported on {tuning.reported_on} others; 95 % intervals", "", tuning.markdown(), "", _WORDS)
    if len(samples) < _FEW:
        sys.stderr.write(f"reccomp-hf: warning: {len(samples)} questions are few; 100 to 200 choose reliably.\n")
    if arguments.write:
        changed = write_section(Path(arguments.model), tuning.section, {"data": arguments.data, **tuning.record()})
        say("", *_written(arguments.model, changed))
    if arguments.output:
        next_step = f"Next: reccomp-hf predict DATA --model {arguments.model} --section {arguments.output}"
        say("", f"Wrote {arguments.output}.", *([] if tuning.section is None else [next_step]))
    write_results(
        arguments,
        lambda: {"model": arguments.model, "data": arguments.data, **tuning.record()},
        lambda: plot_tuning(tuning, f"{arguments.model}: {tuning.reported_on} questions"),
    )


def _apply(arguments: argparse.Namespace) -> None:
    """Put the section of a file that an earlier run wrote into a checkpoint; nothing is measured."""
    from ..checkpoints.json_files import read_json
    from ..checkpoints.tuning_record import write_section

    _check_folder(arguments.model, "--apply")
    fields, record = file_fields(arguments.apply), read_json(Path(arguments.apply)).get("tuning")
    if not isinstance(record, dict):
        raise ValueError(f"{arguments.apply} has no record of tuning: expected the --output of reccomp-hf tune.")
    say(*_written(arguments.model, write_section(Path(arguments.model), fields, record)))


def _check_folder(model: str, option: str) -> None:
    if model in CHECKPOINTS or not Path(model).is_dir():
        raise ValueError(
            f"{option} changes the config.json of a folder of yours, got {model}: name a folder, or write a section "
            "file with --output."
        )


def _written(model: str, files: list[Path]) -> list[str]:
    return [f"Wrote {' and '.join(map(str, files))}.", f"Next: reccomp-hf card {model}"]


def _names(arguments: argparse.Namespace) -> list[str]:
    from ..measure.evaluation.settings import split_settings

    return split_settings(arguments.candidates)


def _samples(arguments: argparse.Namespace) -> Any:
    from ..demo import VALIDATION_SEEDS
    from ..measure.evaluation import demo_samples, load_samples

    if arguments.data == DEMO_DATA:
        if arguments.question:
            raise ValueError("--question asks one question of every row; the demo's scenes have their own questions.")
        return demo_samples(arguments.limit or DEMO_QUESTIONS, seeds=VALIDATION_SEEDS)
    return load_samples(arguments.data, arguments.limit, answered=False, asked=arguments.question)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "find the setting that keeps a model's own answers, without labels",
        "Compares settings by how far they move the answers of this checkpoint from those it gives when it reads\n"
        "all visual tokens. Needs 100 to 200 questions of the kind that will be asked, and no answers. Settings are\n"
        "chosen on half of the images and reported on the other half; the present section is kept unless another\n"
        "one is closer to the uncompressed model and the 95 % interval of the difference excludes zero.\n\n"
        "With --output, measurements are kept in OUTPUT.parts until the end: after a kill the same command resumes.",
        " demo-global --budget 14",
        " ./llava-reccomp --data questions.jsonl --budget 64 --by-question --output tuned.json",
        ' ./llava-reccomp --data photos/ --question "What is shown?" --agreement 0.95 --write',
        " demo --frontier --plot frontier.png",
    )
    add_checkpoint(command)
    command.add_argument(
        "--data",
        default=DEMO_DATA,
        metavar="DATA",
        help="demo (drawn scenes); a file of JSON lines with image and question; or a Parquet file or a folder of the "
        "datasets library with these columns",
    )
    command.add_argument("--question", metavar="TEXT", help="ask every row this question, in place of a column")
    command.add_argument(
        "--limit", type=count, metavar="N", help=f"questions (default: {DEMO_QUESTIONS} of demo, else all)"
    )
    goal = command.add_mutually_exclusive_group()
    goal.add_argument(
        "--budget",
        type=_fixed_budget,
        metavar="N|SHARE",
        help="tokens per image or a share of its patches (default: the checkpoint's own, else 0.1)",
    )
    goal.add_argument(
        "--average",
        type=_fixed_budget,
        metavar="N|SHARE",
        help="mean over all questions, with --by-question or --dynamic, where the number differs",
    )
    goal.add_argument(
        "--agreement", type=float, metavar="SHARE", help="the fewest tokens that keep this share of the answers"
    )
    goal.add_argument("--frontier", action="store_true", help="the best setting of several budgets; chooses none")
    command.add_argument(
        "--by-question", action="store_true", help="also a setting for each of the questions' beginnings, as rules"
    )
    command.add_argument(
        "--dynamic", action="store_true", help="the paper's dynamic count with the threshold that gives --average"
    )
    command.add_argument(
        "--candidates",
        default=TUNE_CANDIDATES[0],
        metavar="few|many|LIST",
        help="few diverse settings; many, of which half leave twice; or settings without a budget as for eval, "
        "separated by commas",
    )
    add_settings(command, "one field that all candidates get; may be repeated")
    command.add_argument("--output", type=output_file, metavar="FILE", help="section file, for --section elsewhere")
    command.add_argument("--overwrite", action="store_true", help="start over: remove the output, finished or not")
    command.add_argument("--write", action="store_true", help="put the section into the checkpoint's config.json")
    command.add_argument(
        "--apply", metavar="FILE", help="put the section of a finished --output into config.json; measures nothing"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split and of the intervals")
    add_answer_options(command, TUNE_BATCH_SIZE, TUNE_NEW_TOKENS)
    add_json_file(command)
    command.add_argument("--plot", type=output_image, metavar="FILE", help="draw divergence against tokens")
    add_device(command)
    add_cuda_graph(command)
    add_dtype(command)


def _fixed_budget(text: str) -> int | float:
    """Read a number of tokens or a share of them."""
    value = budget(text)
    if value is None:
        raise argparse.ArgumentTypeError("a dynamic number is not a budget; see --dynamic with --average")
    return value


__all__ = ["register", "run"]
