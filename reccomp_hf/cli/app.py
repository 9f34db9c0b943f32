"""`reccomp-hf app`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from .options import (
    add_address,
    add_checkpoint,
    add_command,
    add_cuda_graph,
    add_device,
    add_dtype,
    add_section,
    count,
    host_name,
    start_fields,
)
from .output import say

DEFAULT_NEW_TOKENS = 128


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    _check_packages()
    if arguments.space is not None:
        if arguments.section is not None:
            raise ValueError(
                "--section holds for a page that is opened here; for a Space put it into the checkpoint, with "
                "`reccomp-hf tune --write`."
            )
        _write_space(arguments)
        return
    if arguments.package is not None:
        raise ValueError("--package belongs to --space DIR: it names what a Space installs.")
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..engines.app.running import open_page
    from ..engines.app.talks import Talks
    from ..engines.server.listening import listen
    from .serve import names_of

    fields = start_fields(arguments)
    listen(arguments.host, arguments.port).close()  # before anything is loaded
    with quiet(progress_bars=sys.stderr.isatty()):
        model, processor = load(
            arguments.model, fields, arguments.device, arguments.dtype, cuda_graph=arguments.cuda_graph
        )
        talks = Talks(model, processor, arguments.max_new_tokens)
        talks.warm_up()
        name = names_of(arguments.model)[0]
        with open_page(talks, name, arguments.host, arguments.port, tuple(arguments.allow_host)) as (_, url):
            say(f"The page of {name} is at {url} (Ctrl-C ends it).")
            stop = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: stop.set())  # as Ctrl-C: visitors' pictures are deleted
            with contextlib.suppress(KeyboardInterrupt):
                stop.wait()
        say("Stopped.")


def _check_packages() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("reccomp-hf app needs gradio: pip install 'reccomp_hf[app]'.")


def _write_space(arguments: argparse.Namespace) -> None:
    from ..checkpoints.info import describe, folder_of
    from ..engines.app.space import write_space

    folder = Path(arguments.space)
    describe(folder_of(arguments.model), arguments.model)  # that the Space will find a compressed model
    written = write_space(folder, arguments.model, arguments.package)
    say(
        f"Wrote {', '.join(written)} to {folder}.",
        f"  Try it here: python {folder / 'app.py'}",
        "",
        f"Next: reccomp-hf push {folder} OWNER/NAME --space",
    )


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "ask in the browser, and see what is read",
        "Opens a page for one checkpoint: a picture, a conversation about it, the patches that were read, and the\n"
        "answers of two settings with their tokens and times. Needs pip install 'reccomp_hf[app]'.",
        " demo",
        " ./llava-reccomp --port 8080",
        " me/llava-reccomp --space ./my-space",
    )
    add_checkpoint(command)
    add_section(command, "in place of the checkpoint's own")
    add_address(command, 7860)
    command.add_argument(
        "--allow-host",
        type=host_name,
        action="append",
        default=[],
        metavar="NAME",
        help="answer under this host name; may be repeated (default: names of this machine on 127.0.0.1, any name on "
        "other addresses)",
    )
    command.add_argument(
        "--max-new-tokens", type=count, default=DEFAULT_NEW_TOKENS, metavar="N", help="tokens of the longest answer"
    )
    command.add_argument(
        "--space", metavar="DIR", help="write a Space of the Hugging Face Hub that shows the page, and open no page"
    )
    command.add_argument(
        "--package",
        metavar="LINE",
        help="line of the Space's requirements.txt that installs this package, 'reccomp_hf[app]==0.1.0' or "
        "'reccomp_hf[app] @ git+https://...' (default: the Space gets a copy of the package)",
    )
    add_device(command)
    add_dtype(command)
    add_cuda_graph(command)


__all__ = ["register", "run"]
