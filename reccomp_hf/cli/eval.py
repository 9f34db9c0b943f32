"""`reccomp-hf eval`."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from .choices import EVAL_BATCH_SIZE, EVAL_METHODS, EVAL_SETTINGS
from .options import (
    add_answer_options,
    add_checkpoint,
    add_command,
    add_cuda_graph,
    add_device,
    add_dtype,
    add_json_file,
    add_section,
    check_not_overwritten,
    count,
    output_image,
    start_fields,
)
from .output import say, write_results

DEMO_DATA, DEMO_QUESTIONS = "demo", 2000
STORED = "stored"


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..core.rules import rule_text
    from ..measure.evaluation import evaluate, parse_setting, parse_settings, plot_accuracy

    fields = start_fields(arguments)
    settings = parse_settings(arguments.settings)  # before anything is loaded
    if arguments.section and STORED not in [setting.name for setting in settings]:
        settings = [parse_setting(STORED), *settings]
    names = {setting.name for setting in settings} | {"off"}
    for pair in arguments.compare:
        unknown = [name for name in pair if name not in names]
        if unknown:
            raise ValueError(f"--compare names {unknown[0]!r}, which is not among --settings {arguments.settings}.")
    check_not_overwritten(arguments.data, [arguments.json, arguments.plot])
    samples = _samples(arguments)
    with quiet():
        where = {"device": arguments.device, "dtype": arguments.dtype, "cuda_graph": arguments.cuda_graph}
        model, processor = load(arguments.model, fields, **where)
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
    questions = f"{len(samples)} question{'s' if len(samples) > 1 else ''}"
    on = f"{pictures} image{'s' if pictures > 1 else ''} ({arguments.data})"
    note = "95 % intervals" if pictures > 1 else "intervals need more than one image"
    say(f"{arguments.model}: {questions} on {on}; {note}", "")
    say(report.markdown(pairs))
    for setting in settings:
        section = model.config.token_recovery.replace(setting.fields)
        rules = section.rules if section.enabled else []
        say(*(f"{setting.name}, rule {number}: {rule_text(rule)}" for number, rule in enumerate(rules)))
    write_results(
        arguments,
        lambda: {"model": arguments.model, "data": arguments.data, **report.to_dict(pairs)},
        lambda: plot_accuracy(report, f"{arguments.model}: {len(samples)} questions"),
    )


def _samples(arguments: argparse.Namespace) -> Any:
    from ..measure.evaluation import demo_samples, load_samples

    if arguments.data == DEMO_DATA:
        return demo_samples(arguments.limit or DEMO_QUESTIONS, arguments.skip)
    if arguments.skip:
        raise ValueError("--skip passes over drawn scenes; use it with --data demo only.")
    return load_samples(arguments.data, arguments.limit)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "measure accuracy, agreement with the uncompressed model, tokens",
        "Asks a checkpoint the same questions under several settings and prints a table.\n\n"
        "A setting is NAME[:BUDGET][+field=value...]. Names: off (all tokens), stored (the checkpoint's own),\n"
        "the presets paper, authors, balanced and balanced-v1; visual and text (one of the paper's stages alone,\n"
        "nothing merged), coverage (evenly spread) and pool (means of grid cells), each with a budget; and every\n"
        f"method by its name, with its published settings:\n{textwrap.fill(', '.join(EVAL_METHODS), 100)}\n"
        "(fastervlm is the method visual). A budget is a number of tokens, a share of them, or dynamic. off always\n"
        "runs. An answer is right if it equals an expected one up to case, punctuation, articles and white space.",
        " demo --settings paper,balanced:0.1,visual:16,text:16,random:16 --compare text:16 visual:16",
        " demo --settings 'cdpruner:16,prumerge:dynamic,random:16+method_options={\"seed\":1}'",
        " ./llava-reccomp --data questions.jsonl --settings paper:64 --section tuned.json",
        " ./llava-reccomp --data questions.jsonl --settings stored,text:64+text_relevance=value --json out.json",
    )
    add_checkpoint(command)
    command.add_argument(
        "--data",
        default=DEMO_DATA,
        metavar="DATA",
        help="demo (held-out drawn scenes); a file of JSON lines with image, question, answers and perhaps kind; or a "
        "Parquet file or a folder of the datasets library with these columns",
    )
    command.add_argument("--settings", default=EVAL_SETTINGS, metavar="LIST", help="settings separated by commas")
    add_section(command, f"evaluated as {STORED!r}, in place of the checkpoint's own")
    command.add_argument(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar="SETTING",
        help="add the difference of the first and the second; may be repeated",
    )
    command.add_argument(
        "--limit", type=count, metavar="N", help=f"questions (default: {DEMO_QUESTIONS} of demo, else all)"
    )
    command.add_argument("--skip", type=int, default=0, metavar="N", help="pass over the first N drawn scenes")
    add_answer_options(command, EVAL_BATCH_SIZE, max_new_tokens=16)
    add_json_file(command)
    command.add_argument("--plot", type=output_image, metavar="FILE", help="draw accuracy against tokens")
    add_device(command)
    add_cuda_graph(command)
    add_dtype(command)


__all__ = ["register", "run"]
