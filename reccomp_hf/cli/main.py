"""The command line, `reccomp-hf`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import traceback
from typing import NoReturn

from .. import __version__, register
from ..core.settings import did_you_mean
from . import GROUPS
from .choices import EVAL_METHODS
from .output import say


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. An error is one line on stderr and the code 2, Ctrl-C the code 130."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("reccomp-hf: interrupted\n")
        return 130


def _main(argv: list[str] | None) -> int:
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        options = re.findall(r"--[a-z][a-z-]*", arguments.format_help())
        known = sorted(set(options)) if unknown[0].startswith("--") else []
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        what = f"unrecognized arguments: {' '.join(unknown)}{hint and '; ' + hint}"
        parser.exit(2, f"reccomp-hf: error: {what} (see {arguments.prog} --help)\n")
    if arguments.run is None:
        say(parser.format_help().rstrip())
        return 2
    try:
        register()  # imports torch and transformers
        arguments.run(arguments)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"reccomp-hf: error: {_one_line(error)}\n")
        return 2
    return 0


_WRITERS_OF_SENTENCES = ("huggingface_hub", "jinja2", "safetensors")
"""Packages whose errors of other types say what is wrong with a config, a chat template or a weight file."""


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    origin = type(error).__module__.partition(".")[0]
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) or origin in _WRITERS_OF_SENTENCES:
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and where help is; exit with 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        hint = did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2])) if choice else ""
        if choice and "--preset" in message and choice[1] in EVAL_METHODS:
            hint = f"for a published method write --set method={choice[1]}"
        self.exit(2, f"reccomp-hf: error: {message}{hint and '; ' + hint} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="reccomp-hf",
        usage="reccomp-hf [-h] [--version] [--debug] COMMAND ...",
        description="Compressed LLaVA models for transformers, which read a fraction of their visual tokens.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reccomp-hf {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=None, prog=parser.prog, format_help=parser.format_help)
    commands = parser.add_subparsers(prog="reccomp-hf", metavar="COMMAND", help=argparse.SUPPRESS)
    lines = []
    for purpose, group in GROUPS.items():
        lines += ["", f"{purpose}:"]
        for command in group:
            command.register(commands)
            name = command.__name__.rpartition(".")[2]
            summary = commands.choices[name].get_default("summary")
            lines += textwrap.wrap(f"  {name:<12}{summary}", 80, subsequent_indent=" " * 14)
    lines += ["", "example:", "  reccomp-hf demo", "", "Every command has a --help with an example."]
    parser.epilog = "\n".join(lines[1:])
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
