"""`reccomp-hf bench`."""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .choices import BENCH_BATCH_SIZES, BENCH_BUDGETS, BENCH_CONFIGS, BENCH_NEW_TOKENS, BENCH_ROUNDS
from .options import (
    add_checkpoint,
    add_command,
    add_cuda_graph,
    add_device,
    add_dtype,
    add_json_file,
    add_preset,
    add_section,
    budgets,
    count,
    counts,
    image_size,
    output_image,
    start_fields,
)
from .output import say, write_results

DEFAULT_PRESET = "balanced"


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.quiet import quiet
    from ..measure.benchmark import check_gpu, compare, comparison_text, largest_batches, plot_comparison

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes its own log to stderr
    if arguments.report is not None:
        _report(arguments)
        return
    with quiet():
        name, model, inputs_of = _contender(arguments)
        if arguments.largest_batch:
            check_gpu(model.device)  # before the long work
        facts = compare(
            model,
            inputs_of,
            batch_sizes=arguments.batch_sizes,
            budgets=arguments.budgets,
            new_tokens=arguments.new_tokens,
            rounds=arguments.repeats,
            cpu_time=arguments.cpu_time,
            cuda_graph=arguments.cuda_graph,
        )
        if arguments.largest_batch:
            facts["largest_batches"] = largest_batches(
                model, inputs_of, budgets=arguments.budgets, new_tokens=arguments.new_tokens
            )
    facts = {"name": name, "seed": arguments.seed, "picture": arguments.image_size, **facts}
    say(comparison_text(name, facts))
    write_results(arguments, lambda: facts, lambda: plot_comparison(name, facts))


def _report(arguments: argparse.Namespace) -> None:
    """Write the table of speeds: of published sizes on a GPU, of the shipped checkpoint on a CPU."""
    import torch

    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..measure.benchmark import published_report, speed_markdown

    folder = Path(arguments.report)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model, processor = load("demo", {}, arguments.device, "float32")
        facts = published_report(model, processor, getattr(torch, arguments.dtype or "bfloat16"))
    text = speed_markdown(facts)
    (folder / "speed.md").write_text(text, encoding="utf-8")
    (folder / "speed.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    say(text, f"Wrote {folder / 'speed.md'} and {folder / 'speed.json'}.")


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "time a model in turns: stock, compressed, and the limit",
        "Times a model on prompts with images, in turns within one process: the stock model; ours; and the\n"
        "oracle, the limit: the stock vision tower and the embeddings of the short prompt at no cost.\n"
        "Ratios are taken within a round and reported with their quartiles. A --config has random weights, so\n"
        "nothing is downloaded; its dynamic counts are set to about a tenth.",
        " demo --batch-sizes 1,8 --budgets dynamic,16",
        " --config mid --device cpu --json bench.json --plot bench.png",
        " --config llava-1.5-7b --device cuda --dtype bfloat16 --batch-sizes 1,8,32 --largest-batch",
        " --report speeds",
    )
    source = command.add_mutually_exclusive_group(required=True)
    add_checkpoint(source, nargs="?")
    source.add_argument(
        "--config", choices=BENCH_CONFIGS, metavar="NAME", help=f"random weights; one of {', '.join(BENCH_CONFIGS)}"
    )
    source.add_argument(
        "--report", metavar="DIR", help="write the table of speeds of published sizes, in nine minutes of an H100"
    )
    add_preset(command, text=f"settings of a --config (default: {DEFAULT_PRESET})")
    add_section(command, "in place of --preset or a checkpoint's own; --budgets replaces its budget and its rules")
    add_device(command)
    add_dtype(command, "float32 on a CPU, elsewhere bfloat16, or as a checkpoint stores them")
    command.add_argument(
        "--batch-sizes", type=counts, default=_joined(BENCH_BATCH_SIZES), metavar="LIST", help="prompts per batch"
    )
    command.add_argument(
        "--budgets",
        type=budgets,
        default=_joined(BENCH_BUDGETS),
        metavar="LIST",
        help="tokens per image, shares of its patches, or dynamic",
    )
    command.add_argument(
        "--new-tokens", type=count, default=BENCH_NEW_TOKENS, metavar="N", help="tokens to decode per prompt"
    )
    command.add_argument("--repeats", type=count, default=BENCH_ROUNDS, metavar="N", help="rounds of turns")
    command.add_argument(
        "--image-size",
        type=image_size,
        metavar="WxH",
        help="pixels of the images, which decide the tiles (default: 640x480; scenes as drawn for a checkpoint)",
    )
    command.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds of the process, for a machine with other work"
    )
    add_cuda_graph(command)
    command.add_argument("--largest-batch", action="store_true", help="search for the largest batch that a GPU holds")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and inputs")
    add_json_file(command)
    command.add_argument("--plot", type=output_image, metavar="FILE", help="draw the results")


def _contender(arguments: argparse.Namespace) -> tuple[str, Any, Any]:
    """Name, model, and a function that makes a batch of a size."""
    from ..checkpoints.loading import load
    from ..measure.benchmark import named_config, noise_batch, random_model, scene_batch, sharpen

    if arguments.config is None:
        if arguments.preset is not None:
            raise ValueError("--preset goes with --config; a checkpoint has its own settings.")
        model, processor = load(arguments.model, start_fields(arguments), arguments.device, arguments.dtype)
        inputs_of = functools.partial(scene_batch, model, processor, picture=arguments.image_size, seed=arguments.seed)
        return arguments.model, model, inputs_of
    import torch

    config = named_config(arguments.config, arguments.preset or DEFAULT_PRESET)
    if arguments.section:
        config.token_recovery = config.token_recovery.replace(start_fields(arguments))
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.empty(1, device=device)  # before anything is built
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = random_model(config, device, dtype, arguments.seed)
    inputs_of = functools.partial(noise_batch, model, picture=arguments.image_size, seed=arguments.seed)
    sharpen(model, inputs_of(2))
    return f"{arguments.config} with random weights", model, inputs_of


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


__all__ = ["register", "run"]
