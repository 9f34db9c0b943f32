"""`reccomp-hf push`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from .options import add_command
from .output import say


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.hub import push
    from ..checkpoints.hub_space import push_space
    from ..checkpoints.quiet import quiet

    with quiet(progress_bars=sys.stderr.isatty()):
        pushed = (push_space if arguments.space else push)(
            arguments.folder,
            arguments.repo,
            private=True if arguments.private else None,
            revision=arguments.revision,
            message=arguments.message,
        )
    if arguments.json:
        say(json.dumps(dataclasses.asdict(pushed), indent=2))
        return
    removed = f", {len(pushed.removed)} code files of an older layout removed" if pushed.removed else ""
    done = (
        f"{pushed.files} files in one commit{removed}"
        if pushed.changed
        else "nothing has changed, so there is no new commit"
    )
    source = pushed.repo if arguments.revision is None else f"{pushed.repo}@{pushed.branch}"
    after = f"Next: reccomp-hf info {source}" if not arguments.space else "The Hub builds the Space in a few minutes."
    say(f"Pushed {arguments.folder}: {done}.", f"  {pushed.url}", "", after)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "publish a compressed checkpoint on the Hugging Face Hub",
        "Publishes weights, config, tokenizers, code and model card in one commit. The folder is checked\n"
        "first; a card is written if README.md is missing. No other file of the folder is sent, and only\n"
        "weight files may be links. Code that an older version of this package pushed is replaced; no other file\n"
        "on the Hub is deleted.",
        " ./llava-reccomp me/llava-reccomp",
        " ./llava-reccomp me/llava-reccomp --private --revision budget-64",
        " ./my-space me/my-space --space",
    )
    command.add_argument("folder", metavar="FOLDER", help="a folder that `reccomp-hf convert` wrote, or a Space")
    command.add_argument("repo", metavar="REPO", help="owner/name on the Hub; created if it does not exist")
    command.add_argument(
        "--space", action="store_true", help="the folder is a Space that `reccomp-hf app MODEL --space` wrote"
    )
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to; created if it does not exist (default: main)"
    )
    command.add_argument("--message", metavar="TEXT", help="commit message")
    command.add_argument("--json", action="store_true", help="print one JSON object")


__all__ = ["register", "run"]
