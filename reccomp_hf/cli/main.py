"""The command line, `reccomp-hf`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import NoReturn

from .. import __version__, register
from . import COMMANDS
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
        what = f"unrecognized arguments: {' '.join(unknown)}"
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


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and where help is; exit with 2."""
        self.exit(2, f"reccomp-hf: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="reccomp-hf",
        description="Compressed LLaVA models for transformers, which read a fraction of their visual tokens.",
        epilog="example:\n  reccomp-hf demo\n\nEvery command has a --help with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reccomp-hf {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=None, prog=parser.prog)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
