"""`reccomp-hf cost`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .choices import CHECKPOINTS, COST_DTYPES, COST_IMAGE_SIZE, HARDWARE, PUBLISHED
from .options import add_command, add_preset, add_section, count, image_size, start_fields
from .output import line, say

DEFAULT_CONFIG, DEFAULT_PRESET = "llava-1.5-7b", "balanced"

FLOP, SECONDS, BYTES = (
    {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6},
    {"ms": 1e-3, "µs": 1e-6},
    {"GB": 1e9, "MB": 1e6, "kB": 1e3},
)
CELLS: dict[str, tuple[str, dict[str, float] | None]] = {
    "visual_tokens": ("visual tokens", None),
    "prompt_tokens": ("prompt tokens", None),
    "prefill_flops": ("prefill", FLOP),
    "prefill_seconds": ("prefill", SECONDS),
    "prefill_traffic_bytes": ("  memory traffic", BYTES),
    "prefill_activation_bytes": ("  stored activations", BYTES),
    "vision_tower_seconds": ("vision tower", SECONDS),
    "projector_seconds": ("projector", SECONDS),
    "text_encoder_seconds": ("text encoder", SECONDS),
    "first_token_seconds": ("all up to the first token", SECONDS),
    "kv_cache_bytes": ("KV cache", BYTES),
    "decode_seconds": ("decoding a token", SECONDS),
    "weight_bytes": ("weights", BYTES),
    "largest_batch": ("largest batch that fits", None),
    "largest_batch_tokens_per_second": ("  its tokens per second", None),
}
"""Entry of a row -> label, and the units that fit it, the largest first; `None` for a number without a unit."""


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..measure.cost import compare_costs

    name, config = _config(arguments)
    if arguments.section:
        config.token_recovery = config.token_recovery.replace(start_fields(arguments))
    facts = compare_costs(
        config,
        arguments.visual_tokens,
        hardware=arguments.hardware,
        dtype=arguments.dtype,
        text_tokens=arguments.text_tokens,
        batch=arguments.batch,
        picture=arguments.picture,
    )
    say(json.dumps({"name": name, **facts}, indent=2) if arguments.json else report(name, facts))


def report(name: str, facts: dict[str, Any]) -> str:
    """The comparison as a table: a column per row, with its ratio to the stock model where that is useful."""
    rows = facts["rows"]
    lines = [
        line("model", f"{name}, {_parameters(facts['parameters']['total'])} parameters"),
        line("hardware", f"{facts['hardware']['name']} ({facts['hardware']['source']}), {facts['dtype']}"),
        line("prompt", f"{facts['text_tokens']} text tokens and an image{_image(facts)}, batch {facts['batch']}"),
        *([line("visual tokens", "the most that a rule of the checkpoint allows")] * facts["largest_of_rules"]),
        "",
        f"  {'':<30}{'stock':>14}" + "".join(f"{'compressed':>22}" for _ in rows[1:]),
    ]
    for entry, (label, units) in CELLS.items():
        values = [row[entry] for row in rows]
        texts = [f"{value:,.0f}" for value in values]
        if units is not None:
            unit, size = _unit(values, units)
            label, texts = f"{label}, {unit}", [f"{value / size:,.2f}" for value in values]
        cells = [f"{texts[0]:>14}"]
        for row, text in zip(rows[1:], texts[1:], strict=True):
            ratio = row["ratios"].get(entry)
            cells.append(f"{text:>14}" + (f"{ratio:>7.2f}x" if ratio else " " * 8))
        lines.append(f"  {label:<30}{''.join(cells)}".rstrip())
    return "\n".join(
        [
            *lines,
            "",
            "Estimated, not measured: per operator the slower of computing and moving at the card's ceilings.",
            "Vision side in fp16. Real kernels take longer, and launching them is not in it. Neither is the choice",
            "of tokens: less than 1 % of a prefill on a CPU, but on a GPU launching its kernels can cost more than",
            "it saves at batch 1. `reccomp-hf bench` measures it.",
        ]
    )


def _parameters(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def _unit(values: list[float], units: dict[str, float]) -> tuple[str, float]:
    """The largest unit in which every value that is not 0 is at least 0.1, or else the smallest."""
    least = min((value for value in values if value), default=0.0)
    fitting = [(name, size) for name, size in units.items() if least >= 0.1 * size]
    return fitting[0] if fitting else list(units.items())[-1]


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "estimate time, memory and batch size, stock against compressed",
        "Estimates with a roofline model what a LLaVA costs with all its visual tokens and with fewer. Needs no\n"
        "weights and no accelerator. With LLaVA-1.5-7B at 56 visual tokens it reproduces the paper's table.",
        "",
        " --config llava-1.5-7b --visual-tokens 56 --dtype int8",
        " ./llava-reccomp --hardware H100 --batch 8 --json",
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        help=f"a compressed checkpoint: a folder, a Hub id, {' or '.join(CHECKPOINTS)}",
    )
    source.add_argument(
        "--config",
        choices=PUBLISHED,
        metavar="NAME",
        help=f"one of {', '.join(PUBLISHED)} (default: {DEFAULT_CONFIG})",
    )
    add_preset(command, text=f"settings of a named --config (default: {DEFAULT_PRESET})")
    add_section(command, "in place of --preset or a checkpoint's own")
    command.add_argument(
        "--hardware", type=_hardware, default="A100", metavar="NAME", help=f"one of {', '.join(HARDWARE)}"
    )
    command.add_argument("--dtype", choices=COST_DTYPES, default="fp16", help="data type of the language model")
    command.add_argument(
        "--text-tokens", type=int, default=60, metavar="N", help="tokens of a prompt in addition to the visual ones"
    )
    command.add_argument(
        "--visual-tokens",
        type=count,
        nargs="+",
        metavar="N",
        help="numbers of visual tokens to compare (default: the number that the settings give)",
    )
    command.add_argument("--batch", type=count, default=1, metavar="N", help="prompts per batch")
    command.add_argument(
        "--picture",
        type=image_size,
        default="x".join(map(str, COST_IMAGE_SIZE)),
        metavar="WxH",
        help="pixels of the image, for LLaVA-NeXT",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object, in bytes and seconds")


def _hardware(text: str) -> str:
    """Read the name of an accelerator, in any case."""
    for name in HARDWARE:
        if name.replace(" ", "").lower() == text.replace(" ", "").lower():
            return name
    raise argparse.ArgumentTypeError(f"unknown hardware {text!r}; known are {', '.join(HARDWARE)}")


def _config(arguments: argparse.Namespace) -> tuple[str, Any]:
    """Name and config of the model to estimate."""
    if arguments.folder is None:
        from ..measure.published import full_size

        name = arguments.config or DEFAULT_CONFIG
        return name, full_size(name).config(arguments.preset or DEFAULT_PRESET)
    if arguments.preset is not None:
        raise ValueError("--preset goes with --config; a checkpoint has its own settings.")
    from ..checkpoints.info import folder_of
    from ..checkpoints.processors import load_config
    from ..checkpoints.quiet import quiet
    from ..core.configuration import TokenRecoveryConfig

    with quiet():
        config = load_config(folder_of(arguments.folder))
    if not isinstance(getattr(config, "token_recovery", None), TokenRecoveryConfig):
        raise ValueError(f"{arguments.folder} is not a compressed LLaVA: its model_type is {config.model_type!r}.")
    return arguments.folder, config


def _image(facts: dict[str, Any]) -> str:
    if facts["picture"] is None:
        return ""
    width, height = facts["picture"]
    return f" of {width} x {height} ({facts['tiles']} tiles, newlines counted)"


__all__ = ["register", "run"]
