"""`reccomp-hf bench`."""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any

from ..checkpoints.loading import DTYPES, load
from ..core.settings import PRESETS
from ..measure.benchmark import (
    BATCH_SIZES,
    BUDGETS,
    CONFIGS,
    DYNAMIC,
    check_gpu,
    compare,
    comparison_text,
    largest_batches,
    named_config,
    noise_batch,
    plot_comparison,
    random_model,
    scene_batch,
    sharpen,
)
from .common import add_command, picture_size, quiet, say
from .models import check_file, check_picture

DEFAULT_PRESET = "balanced"


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    rounds = {} if arguments.repeats is None else {"rounds": arguments.repeats}
    shared = {**rounds, "cpu_time": arguments.cpu_time}
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
            **shared,
        )
        if arguments.largest_batch:
            facts["largest_batches"] = largest_batches(
                model, inputs_of, budgets=arguments.budgets, new_tokens=arguments.new_tokens
            )
    facts = {"name": name, "seed": arguments.seed, "picture": arguments.image_size, **facts}
    _finish(arguments, facts, comparison_text(name, facts), functools.partial(plot_comparison, name))


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "measure time, memory and reads of the device: stock, ours, and the limit",
        "Times a model on prompts with pictures, in turns within one process: the stock model; ours; and the\n"
        "oracle, the limit, which is the stock vision tower and the short prompt's embeddings for nothing.\n"
        "Ratios are taken within a round and come with their quartiles. A --config has random weights, so\n"
        "nothing is downloaded; its dynamic counts are set to about a tenth.",
        " demo --batch-sizes 1,8 --budgets dynamic,16",
        " --config mid --device cpu --json bench.json --plot bench.png",
        " --config llava-1.5-7b --device cuda --dtype bfloat16 --batch-sizes 1,8,32 --largest-batch",
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "model", metavar="MODEL", nargs="?", help="a compressed checkpoint: folder, Hub id, demo or demo-global"
    )
    what.add_argument("--config", metavar="NAME", help=f"random weights; one of {', '.join(CONFIGS)}")
    command.add_argument("--preset", choices=PRESETS, help=f"settings of a --config ({DEFAULT_PRESET})")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (float32 on a CPU; else bfloat16, or as a checkpoint's are)"
    )
    command.add_argument(
        "--batch-sizes",
        type=_counts,
        default=BATCH_SIZES,
        metavar="LIST",
        help=f"rows read at once ({_list(BATCH_SIZES)})",
    )
    command.add_argument(
        "--budgets",
        type=_budgets,
        default=BUDGETS,
        metavar="LIST",
        help=f"tokens per image, shares of its patches, or dynamic ({_list(BUDGETS)})",
    )
    command.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens to decode (16)")
    command.add_argument("--repeats", type=int, metavar="N", help="rounds of turns (7)")
    command.add_argument(
        "--image-size", type=picture_size, metavar="WxH", help="of the pictures; tiles depend on it (640x480)"
    )
    command.add_argument(
        "--cpu-time", action="store_true", help="count the process's CPU seconds: for a machine with other work"
    )
    command.add_argument("--largest-batch", action="store_true", help="search for the largest batch that a GPU holds")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs (0)")
    command.add_argument("--json", type=check_file, metavar="FILE", help="write everything as JSON")
    command.add_argument("--plot", type=check_picture, metavar="FILE", help="draw it")


def _contender(arguments: argparse.Namespace) -> tuple[str, Any, Any]:
    """Name, model, and what gives a batch of a size."""
    if arguments.config is None:
        if arguments.preset is not None:
            raise ValueError("--preset goes with --config; a checkpoint has its own settings.")
        model, processor = load(arguments.model, {}, arguments.device, arguments.dtype)
        inputs_of = functools.partial(scene_batch, model, processor, picture=arguments.image_size, seed=arguments.seed)
        return arguments.model, model, inputs_of
    import torch

    config = named_config(arguments.config, arguments.preset or DEFAULT_PRESET)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.empty(1, device=device)  # before anything is built
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = random_model(config, device, dtype, arguments.seed)
    inputs_of = functools.partial(noise_batch, model, picture=arguments.image_size, seed=arguments.seed)
    sharpen(model, inputs_of(2))
    return f"{arguments.config} with random weights", model, inputs_of


def _finish(arguments: argparse.Namespace, facts: dict[str, Any], text: str, draw: Any) -> None:
    """Say what was found, and write what was asked for."""
    say(text)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(facts).savefig(arguments.plot)
    written = [path for path in (arguments.json, arguments.plot) if path]
    if written:
        say("", f"Wrote {' and '.join(written)}.")


def _list(values: Any) -> str:
    return ",".join(map(str, values))


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected counts separated by commas as in 1,4,16, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _budgets(text: str) -> tuple[int | float | str, ...]:
    found: list[int | float | str] = []
    for part in text.split(","):
        try:
            found.append(part if part == DYNAMIC else int(part) if part.isdecimal() else float(part))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected tokens, shares or dynamic, separated by commas as in dynamic,64,0.1, got {text!r}"
            ) from None
    return tuple(dict.fromkeys(found))


__all__ = ["register", "run"]
