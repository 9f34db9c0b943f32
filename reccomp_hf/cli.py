"""The command line, `reccomp-hf`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import __version__
from .configuration_reccomp import PRESETS, TokenRecoveryConfig


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. An error is one line on stderr and the code 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        _say(parser.format_help().rstrip())
        return 2
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("reccomp-hf: interrupted\n")
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"reccomp-hf: error: {_one_line(error)}\n")
        return 2
    return 0


# ---- demo, convert, info -------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import command

    if arguments.image is None:
        picture = command.drawn_picture(arguments.seed, arguments.question)
    else:
        picture = command.picture_file(arguments.image, arguments.question)
    with _quiet(), command.checkpoint(arguments.preset, arguments.budget, arguments.output) as folder:
        if not arguments.json:
            _say(f"Picture: {picture.source}")
            _say(f"Model:   this package's small LLaVA and CLIP, preset {arguments.preset}; nothing is downloaded", "")
        facts = {"preset": arguments.preset, "output": arguments.output, **command.compare(folder, picture)}
        if arguments.output and picture.seed is not None:
            picture.image.save(folder / "scene.png")
    _say(json.dumps(facts, indent=2) if arguments.json else command.report(facts))


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert
    from .inspection import describe

    if arguments.clip is None and not arguments.visual_only:
        raise ValueError("CLIP is missing: name the CLIP that LLaVA's vision tower came from, or add --visual-only.")
    overrides = dict(arguments.set)
    TokenRecoveryConfig.from_value({**PRESETS[arguments.preset], **overrides})  # before anything is loaded
    clip = None if arguments.visual_only else arguments.clip
    with _quiet(progress_bars=sys.stderr.isatty()):
        folder = convert(arguments.llava, clip, arguments.output, arguments.preset, **overrides)
        facts = describe(folder, str(folder))
    _say(f"Wrote {folder} (preset {arguments.preset}).", *_section_lines(facts), "")
    _say(
        f"Next: reccomp-hf info {folder}, or in Python",
        "  import reccomp_hf, transformers",
        f"  model = transformers.AutoModelForImageTextToText.from_pretrained({str(folder)!r})",
    )


def _info(arguments: argparse.Namespace) -> None:
    from .inspection import describe, folder_of

    with _quiet():
        facts = describe(folder_of(arguments.folder), arguments.folder)
    if arguments.json:
        _say(json.dumps(facts, indent=2))
        return
    files, needed = facts["files"], facts["token_recovery"]["text_encoder_config"] is not None
    absent = "MISSING: the processor cannot read questions" if needed else "none, and none is needed"
    _say(
        arguments.folder,
        *_section_lines(facts),
        *(_line(name, f"{count:>14,} parameters") for name, count in facts["parameters"].items()),
        _line("dtype", ", ".join(facts["dtypes"]) or "unknown: no safetensors files here"),
        _line("weight files", f"{len(files['weights'])}, {files['weight_bytes'] / 1e6:,.1f} MB"),
        _line("recovery tokenizer", "present" if files["recovery_tokenizer"] else absent),
    )


# ---- output -----------------------------------------------------------------------------------------------------


def _section_lines(facts: dict[str, Any]) -> list[str]:
    """The section for a reader."""
    encoder, settings = facts["token_recovery"]["text_encoder_config"], dict(facts["settings"])
    reads = (
        f"CLIP's, {encoder.get('max_position_embeddings', 77)} tokens at a time" if encoder else "none: visual only"
    )
    method = settings.pop("method")
    fields = [f"{name} {json.dumps(value)}" for name, value in settings.items()]
    return [
        _line("model type", facts["model_type"]),
        _line("method", method),
        _line("settings", ", ".join(fields) or "the defaults"),
        _line("question encoder", reads),
        _line("visual tokens", facts["tokens_per_image"]["note"]),
    ]


def _line(name: str, value: str) -> str:
    return textwrap.fill(f"  {name.replace('_', ' '):<20}{value}", 100, subsequent_indent=" " * 22)


@contextlib.contextmanager
def _quiet(progress_bars: bool = False) -> Iterator[None]:
    """Keep transformers' remarks, and its progress bars unless they are wanted, out of what a command says."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


def _setting(text: str) -> tuple[str, Any]:
    """`field=value` as a pair; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected field=value, got {text!r}")
    with contextlib.suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


# ---- arguments -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and where help is; exit with 2."""
        self.exit(2, f"reccomp-hf: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="reccomp-hf",
        description="LLaVA that reads a fraction of its visual tokens, as models of transformers.",
        epilog="example:\n  reccomp-hf demo\n\nEvery command has a --help with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reccomp-hf {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_convert(commands)
    _add_info(commands)
    return parser


def _add_command(commands: Any, run: Callable[..., None], summary: str, description: str, *examples: str) -> Any:
    name = run.__name__.lstrip("_")
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="\n".join(["example:", *(f"  reccomp-hf {name}{example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    debug = "show the traceback of an error"
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Any) -> None:
    from .demo.command import budget

    command = _add_command(
        commands,
        _demo,
        "try it: a small trained model, with and without compression",
        "Converts the small checkpoints of this package, reloads the result and asks it about a drawn scene\n"
        "or a picture of yours, with compression and without. Takes seconds and downloads nothing.",
        "",
        " --seed 1000007 --budget 32",
        ' --image photo.jpg --question "Is there a red circle?"',
    )
    picture = command.add_mutually_exclusive_group()
    picture.add_argument("--image", metavar="FILE", help="a picture file instead of a drawn scene")
    picture.add_argument(
        "--seed", type=int, metavar="N", help="draw another scene; held-out ones are 1000000 to 1999999"
    )
    command.add_argument("--question", nargs="+", action="extend", metavar="TEXT", help="what to ask")
    command.add_argument("--preset", choices=PRESETS, default="balanced", help="settings to start from (balanced)")
    command.add_argument(
        "--budget",
        type=budget,
        metavar="N|SHARE|dynamic",
        help="tokens per image, or their share, or as many as the picture asks for (balanced: 0.11, else dynamic)",
    )
    command.add_argument("--output", metavar="FOLDER", help="keep the converted checkpoint and the drawn scene here")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_convert(commands: Any) -> None:
    command = _add_command(
        commands,
        _convert,
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
        type=_setting,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="one field of the token_recovery section, its value as JSON or a plain word; may be repeated",
    )
    command.add_argument("--visual-only", action="store_true", help="no text encoder: CLIP is not needed, nor read")


def _add_info(commands: Any) -> None:
    command = _add_command(
        commands,
        _info,
        "what a compressed checkpoint is: settings, parameters, tokens",
        "Shows the settings, parameters and visual tokens of a compressed checkpoint. Reads its config and\n"
        "the headers of its weights; a Hub repository's weights are not downloaded.",
        " ./llava-reccomp",
        " ./llava-reccomp --json",
    )
    command.add_argument("folder", metavar="FOLDER", help="a folder that `reccomp-hf convert` wrote, or a Hub id")
    command.add_argument("--json", action="store_true", help="print one JSON object")


if __name__ == "__main__":
    raise SystemExit(main())
