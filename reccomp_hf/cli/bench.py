"""`reccomp-hf bench`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .choices import (
    BENCH_BATCH_SIZES,
    BENCH_BUDGETS,
    BENCH_CONFIGS,
    BENCH_NEW_TOKENS,
    BENCH_ROUNDS,
    DYNAMIC,
    THROUGHPUT_CLIENTS,
    THROUGHPUT_NEW_TOKENS,
    THROUGHPUT_ROUNDS,
)
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
    if arguments.report is not None:
        _report(arguments)
    elif arguments.engine == "vllm":
        _throughput(arguments)
    else:
        _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    """Time batches in one process."""
    from ..checkpoints.quiet import quiet
    from ..measure.benchmark import check_gpu, compare, comparison_text, largest_batches, plot_comparison

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes its own log to stderr
    if len(arguments.new_tokens or ()) > 1:
        raise ValueError("Several --new-tokens go with --engine vllm; without it, name one number.")
    (new_tokens,), budgets = arguments.new_tokens or (BENCH_NEW_TOKENS,), arguments.budgets or BENCH_BUDGETS
    with quiet():
        name, model, inputs_of = _contender(arguments)
        if arguments.largest_batch:
            check_gpu(model.device)  # before the long work
        facts = compare(
            model,
            inputs_of,
            batch_sizes=arguments.batch_sizes or BENCH_BATCH_SIZES,
            budgets=budgets,
            new_tokens=new_tokens,
            rounds=arguments.repeats or BENCH_ROUNDS,
            cpu_time=arguments.cpu_time,
            cuda_graph=arguments.cuda_graph,
        )
        if arguments.largest_batch:
            facts["largest_batches"] = largest_batches(model, inputs_of, budgets=budgets, new_tokens=new_tokens)
    facts = {"name": name, "seed": arguments.seed, "picture": arguments.image_size, **facts}
    say(comparison_text(name, facts))
    write_results(arguments, lambda: facts, lambda: plot_comparison(name, facts))


def _throughput(arguments: argparse.Namespace) -> None:
    """Compare engines of vLLM under load."""
    from ..checkpoints.loading import folder_with_weights
    from ..checkpoints.quiet import quiet
    from ..engines.vllm.random_weights import write_without_weights
    from ..engines.vllm.throughput import compare_throughput, throughput_text
    from ..measure.benchmark import named_config

    _check_throughput_options(arguments)
    given = {
        "clients": arguments.batch_sizes,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.repeats,
        "budget": (arguments.budgets or (None,))[0],
    }
    options = {name: value for name, value in given.items() if value is not None}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        if arguments.config is None:
            name, source = arguments.model, folder_with_weights(arguments.model)
        else:
            name, source = f"{arguments.config} with random weights", Path(folder)
            write_without_weights(named_config(arguments.config, arguments.preset or DEFAULT_PRESET), source)
        facts = compare_throughput(
            source, **options, picture=arguments.image_size, dtype=arguments.dtype, seed=arguments.seed
        )
    facts = {"name": name, "seed": arguments.seed, "picture": arguments.image_size, **facts}
    say(throughput_text(name, facts))
    write_results(arguments, lambda: facts)


def _check_throughput_options(arguments: argparse.Namespace) -> None:
    """Refuse options that do not fit a comparison in vLLM.

    Raises:
        ValueError: One is given, or several budgets.
    """
    for name in ("section", "device", "cpu_time", "cuda_graph", "largest_batch", "plot"):
        if getattr(arguments, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of the engine transformers. With --engine vllm these fit: "
                "--preset, --dtype, --batch-sizes, --budgets, --new-tokens, --repeats, --image-size, --seed, --json."
            )
    _check_preset(arguments)
    if len(arguments.budgets or ()) > 1 or DYNAMIC in (arguments.budgets or ()):
        raise ValueError("--engine vllm compares one fixed budget with the stock model: name it, as in --budgets 64.")


def _check_preset(arguments: argparse.Namespace) -> None:
    if arguments.config is None and arguments.preset is not None:
        raise ValueError("--preset goes with --config; a checkpoint has its own settings.")


def _report(arguments: argparse.Namespace) -> None:
    """Write the table of speeds, again after each of its parts: of published sizes on a GPU, of a demo on a CPU."""
    import torch

    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..measure.benchmark import published_parts, speed_markdown, speed_report

    folder = Path(arguments.report)
    folder.mkdir(parents=True, exist_ok=True)

    def begin(title: str) -> None:  # where there is no terminal for a progress bar
        if not sys.stderr.isatty():
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {title}\n")
            sys.stderr.flush()

    def write(facts: dict[str, Any]) -> None:
        (folder / "speed.md").write_text(speed_markdown(facts), encoding="utf-8")
        (folder / "speed.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    with quiet():
        model, processor = load("demo", {}, arguments.device, "float32")
        on_gpu = model.device.type == "cuda"
        dtype = getattr(torch, arguments.dtype or "bfloat16") if on_gpu else torch.float32
        parts = published_parts(model, processor, dtype)
        facts = speed_report(parts, model.device, dtype, write=write, begin=begin)
    say(speed_markdown(facts), f"Wrote {folder / 'speed.md'} and {folder / 'speed.json'}.")


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "time a model in turns: stock, compressed, and the limit",
        "Times a model on prompts with images, in turns within one process: the stock model; ours; and the\n"
        "oracle, the limit: the stock vision tower and the embeddings of the short prompt at no cost.\n"
        "Ratios are taken within a round and reported with their quartiles. A --config has random weights, so\n"
        "nothing is downloaded; its dynamic counts are set to about a tenth.\n\n"
        "With --engine vllm two engines, the stock model and ours, answer the same requests of some clients in\n"
        "turns: requests per second, time to the first token, and tokens in the KV cache. The budget is fixed.",
        " demo --batch-sizes 1,8 --budgets dynamic,16",
        " --config mid --device cpu --json bench.json --plot bench.png",
        " --config llava-1.5-7b --device cuda --dtype bfloat16 --batch-sizes 1,8,32 --largest-batch",
        " --config llava-1.5-7b --engine vllm --dtype bfloat16 --batch-sizes 1,8,32 --new-tokens 8,64",
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
    command.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what runs; vllm must be installed"
    )
    add_preset(command, text=f"settings of a --config (default: {DEFAULT_PRESET})")
    add_section(command, "in place of --preset or a checkpoint's own; --budgets replaces its budget and its rules")
    add_device(command)
    add_dtype(command, "float32 on a CPU, elsewhere bfloat16, or as a checkpoint stores them")
    command.add_argument(
        "--batch-sizes",
        type=counts,
        metavar="LIST",
        help=f"prompts per batch (default: {_joined(BENCH_BATCH_SIZES)}); in vllm clients (default: "
        f"{_joined(THROUGHPUT_CLIENTS)})",
    )
    command.add_argument(
        "--budgets",
        type=budgets,
        metavar="LIST",
        help=f"tokens per image, shares of its patches, or dynamic (default: {_joined(BENCH_BUDGETS)}); in vllm one "
        "fixed budget (default: the checkpoint's)",
    )
    command.add_argument(
        "--new-tokens",
        type=counts,
        metavar="N",
        help=f"tokens to decode per prompt (default: {BENCH_NEW_TOKENS}); in vllm a list (default: "
        f"{_joined(THROUGHPUT_NEW_TOKENS)})",
    )
    command.add_argument(
        "--repeats",
        type=count,
        metavar="N",
        help=f"rounds of turns (default: {BENCH_ROUNDS}; in vllm {THROUGHPUT_ROUNDS})",
    )
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

    _check_preset(arguments)
    if arguments.config is None:
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
