"""`reccomp-hf convert`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..configuration_reccomp import PRESETS, TokenRecoveryConfig
from ..convert import convert
from ..inspection import describe
from .common import add_command, quiet, say, section_lines, setting


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    if arguments.clip is None and not arguments.visual_only:
        raise ValueError("CLIP is missing: name the CLIP that LLaVA's vision tower came from, or add --visual-only.")
    overrides = dict(arguments.set)
    TokenRecoveryConfig.from_value({**PRESETS[arguments.preset], **overrides})  # before anything is loaded
    clip = None if arguments.visual_only else arguments.clip
    with quiet(progress_bars=sys.stderr.isatty()):
        folder = convert(arguments.llava, clip, arguments.output, arguments.preset, **overrides)
        facts = describe(folder, str(folder))
    say(f"Wrote {folder} (preset {arguments.preset}).", *section_lines(facts), "")
    say(
        f"Next: reccomp-hf info {folder}, or in Python",
        "  import reccomp_hf, transformers",
        f"  model = transformers.AutoModelForImageTextToText.from_pretrained({str(folder)!r})",
    )


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "make a compressed model of a LLaVA and its CLIP",
        "Writes a folder that transformers loads as a compressed LLaVA. Nothing is trained, weights keep\n"
        "their dtype. LLAVA and CLIP are folders or Hub ids; OUTPUT must not exist, or be empty.",
        " llava-hf/llava-1.5-7b-hf openai/clip-vit-large-patch14-336 llava-reccomp --preset balanced",
        " ./llava ./clip ./llava-reccomp --set budget=64 --set text_share=0.25",
    )
    command.add_argument("llava", metavar="LLAVA", help="a LLaVA-1.5 or LLaVA-NeXT in transformers' format")
    command.add_argument("clip", metavar="CLIP", nargs="?", help="the CLIP that its vision tower came from")
    command.add_argument("output", metavar="OUTPUT", help="folder to write")
    command.add_argument("--preset", choices=PRESETS, default="paper", help="settings to start from (paper)")
    command.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="one field of the token_recovery section, its value as JSON or a plain word; may be repeated",
    )
    command.add_argument("--visual-only", action="store_true", help="no text encoder: CLIP is not needed, nor read")


__all__ = ["register", "run"]
