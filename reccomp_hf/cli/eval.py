"""`reccomp-hf eval`."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from ..checkpoints.loading import DTYPES, load
from ..measure.evaluation import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_SETTINGS,
    demo_samples,
    evaluate,
    load_samples,
    named_settings,
    parse_settings,
    plot_accuracy,
)
from .common import add_command, check_counts, quiet, say
from .models import check_file, check_kept, check_picture

DEMO_DATA, DEMO_QUESTIONS = "demo", 2000


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    settings = parse_settings(arguments.settings)  # before anything is loaded
    names = {setting.name for setting in settings} | {"off"}
    for pair in arguments.compare:
        unknown = [name for name in pair if name not in names]
        if unknown:
            raise ValueError(f"--compare names {unknown[0]!r}, which is not among --settings {arguments.settings}.")
    check_counts(arguments, "limit", "batch_size")
    check_kept(arguments.data, arguments.json, arguments.plot)
    if arguments.data == DEMO_DATA:
        samples = demo_samples(arguments.limit or DEMO_QUESTIONS, arguments.skip)
    elif arguments.skip:
        raise ValueError("--skip passes over drawn scenes: it goes with --data demo alone.")
    else:
        samples = load_samples(arguments.data, arguments.limit)
    with quiet():
        model, processor = load(arguments.model, {}, arguments.device, arguments.dtype)
        report = evaluate(
            model,
            processor,
            samples,
            settings,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            instruction=arguments.instruction,
        )
    pairs = [(first, second) for first, second in arguments.compare]
    pictures = len({sample.picture for sample in samples})
    on = f"{pictures} picture{'s' if pictures > 1 else ''} ({arguments.data})"
    say(f"{arguments.model}: {len(samples)} questions on {on}; 95 % intervals", "")
    say(report.markdown(pairs))
    if arguments.json:
        facts = {"model": arguments.model, "data": arguments.data, **report.to_dict(pairs)}
        Path(arguments.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot_accuracy(report, f"{arguments.model}: {len(samples)} questions").savefig(arguments.plot)
    written = [path for path in (arguments.json, arguments.plot) if path]
    if written:
        say("", f"Wrote {' and '.join(written)}.")


def _methods() -> str:
    """The names that are methods, in lines."""
    names = [name for name, fields in named_settings().items() if "method" in fields and name != "pool"]
    return textwrap.fill(", ".join(names), 100)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "measure answers: accuracy, agreement with the uncompressed model, tokens, time",
        "Asks a checkpoint the same questions under several settings and prints a table.\n\n"
        "A setting is NAME[:BUDGET][+field=value...]. Names: off (all tokens), stored (the checkpoint's own),\n"
        "the presets paper, balanced and authors; visual, text (the paper's stages, one alone, nothing merged),\n"
        "coverage (evenly spread), pool (means of the grid's cells), each with a budget; and every method by its\n"
        f"name, with its published settings:\n{_methods()}.\n"
        "(fastervlm is the method visual.) A budget is a number of tokens, a share of them, or dynamic. off always\n"
        "runs. An answer is right if it equals an expected one but for case, punctuation, articles and white space.",
        " demo --settings paper,balanced:0.1,visual:16,text:16,random:16 --compare text:16 visual:16",
        " demo --settings 'cdpruner:16,prumerge:dynamic,random:16+method_options={\"seed\":1}'",
        " ./llava-reccomp --data questions.jsonl --settings stored,text:64+text_relevance=value --json out.json",
    )
    command.add_argument("model", metavar="MODEL", help="a compressed checkpoint: folder, Hub id, demo or demo-global")
    command.add_argument(
        "--data",
        default=DEMO_DATA,
        metavar="DATA",
        help="demo (held-out drawn scenes); a file of JSON lines with image, question, answers and perhaps kind; or a "
        "Parquet file or a folder of the datasets library with these columns (demo)",
    )
    command.add_argument(
        "--settings", default=DEFAULT_SETTINGS, metavar="LIST", help=f"separated by commas ({DEFAULT_SETTINGS})"
    )
    command.add_argument(
        "--compare", nargs=2, action="append", default=[], metavar="SETTING", help="show the first minus the second"
    )
    command.add_argument("--limit", type=int, metavar="N", help=f"questions (demo: {DEMO_QUESTIONS}, else all)")
    command.add_argument("--skip", type=int, default=0, metavar="N", help="pass over the first N drawn scenes")
    command.add_argument(
        "--batch-size", type=int, default=DEFAULT_BATCH_SIZE, metavar="N", help=f"read at once ({DEFAULT_BATCH_SIZE})"
    )
    command.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="longest answer (16)")
    command.add_argument(
        "--instruction", default="", metavar="TEXT", help="written below each question, CLIP does not read it"
    )
    command.add_argument("--json", type=check_file, metavar="FILE", help="write everything as JSON")
    command.add_argument("--plot", type=check_picture, metavar="FILE", help="draw accuracy against tokens")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (float32 on a CPU, else as they are)")


__all__ = ["register", "run"]
