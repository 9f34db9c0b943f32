"""`reccomp-hf cost`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .choices import COST_DTYPES, COST_IMAGE_SIZE, HARDWARE, PUBLISHED
from .options import add_command, add_preset, count, image_size
from .output import line, say

DEFAULT_CONFIG, DEFAULT_PRESET = "llava-1.5-7b", "balanced"

# Entry of a row -> label, factor to the label's unit, and number format.
CELLS: dict[str, tuple[str, float, str]] = {
    "visual_tokens": ("visual tokens", 1, ",d"),
    "prompt_tokens": ("prompt tokens", 1, ",d"),
    "prefill_flops": ("prefill, TFLOP", 1e-12, ",.3f"),
    "prefill_seconds": ("prefill, ms", 1e3, ",.2f"),
    "prefill_traffic_bytes": ("  memory traffic, GB", 1e-9, ",.2f"),
    "prefill_activation_bytes": ("  stored activations, GB", 1e-9, ",.3f"),
    "vision_tower_seconds": ("vision tower, ms", 1e3, ",.2f"),
    "projector_seconds": ("projector, ms", 1e3, ",.2f"),
    "text_encoder_seconds": ("text encoder, ms", 1e3, ",.2f"),
    "first_token_seconds": ("all up to the first token, ms", 1e3, ",.2f"),
    "kv_cache_bytes": ("KV cache, MB", 1e-6, ",.1f"),
    "decode_seconds": ("decoding a token, ms", 1e3, ",.2f"),
    "weight_bytes": ("weights, GB", 1e-9, ",.2f"),
    "largest_batch": ("largest batch that fits", 1, ",d"),
    "largest_batch_tokens_per_second": ("  its tokens per second", 1, ",.0f"),
}


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..measure.cost import compare_costs

    name, config = _config(arguments)
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
        line("model", f"{name}, {facts['parameters']['total'] / 1e9:,.2f} B parameters"),
        line("hardware", f"{facts['hardware']['name']} ({facts['hardware']['source']}), {facts['dtype']}"),
        line("prompt", f"{facts['text_tokens']} text tokens and an image{_image(facts)}, batch {facts['batch']}"),
        "",
        f"  {'':<30}{'stock':>14}" + "".join(f"{'compressed':>22}" for _ in rows[1:]),
    ]
    for entry, (label, factor, form) in CELLS.items():
        cells = [f"{rows[0][entry] * factor:>14{form}}"]
        for row in rows[1:]:
            ratio = row["ratios"].get(entry)
            cells.append(f"{row[entry] * factor:>14{form}}" + (f"{ratio:>7.2f}x" if ratio else " " * 8))
        lines.append(f"  {label:<30}{''.join(cells)}".rstrip())
    return "\n".join(
        [
            *lines,
            "",
            "Estimated, not measured: per operator the slower of computing and moving at the card's ceilings.",
            "Vision side in fp16. Real kernels take longer, and launching them is not in it. Neither is the choice",
            "of tokens, which `reccomp-hf bench` measures as less than 1 % of a prefill.",
        ]
    )


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
    source.add_argument("folder", metavar="FOLDER", nargs="?", help="a compressed checkpoint, or a Hub id")
    source.add_argument(
        "--config",
        choices=PUBLISHED,
        metavar="NAME",
        help=f"one of {', '.join(PUBLISHED)} (default: {DEFAULT_CONFIG})",
    )
    add_preset(command, text=f"settings of a named --config (default: {DEFAULT_PRESET})")
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
