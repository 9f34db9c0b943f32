"""`reccomp-hf serve`."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import Any

from .options import add_checkpoint, add_command, add_model_options, section_fields
from .output import say


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..serving.answering import Service, server_parts
    from ..serving.pictures import PictureReader
    from ..serving.server import build_app, http_server, listen, url_of

    server_parts()  # before anything is loaded
    listener = listen(arguments.host, arguments.port)
    with listener, quiet(progress_bars=sys.stderr.isatty()):
        model, processor = load(arguments.model, section_fields(arguments), arguments.device, arguments.dtype)
        name, *aliases = names_of(arguments.model)
        service = Service(name, model, processor, aliases)
        server = http_server(build_app(service, PictureReader(arguments.allow_urls)), service)
        _log()
        say(f"Serving {name} on {url_of(listener)} (Ctrl-C ends it).")
        if not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
            say("No API key is required: anyone who can reach this address can use it.")
        with contextlib.suppress(KeyboardInterrupt):  # raised once more where a shell has not switched it off
            server.run(sockets=[listener])
        say("Stopped.")


def names_of(model: str) -> list[str]:
    """What clients may call a model that is served under a name: first what is listed, a folder's own name."""
    bare = model.rstrip("/")
    listed = Path(os.path.abspath(model)).name if Path(model).is_dir() else model
    return list(dict.fromkeys(name for name in (listed, model, bare) if name))


def _log() -> None:
    """What the server has to say goes to stderr, a line each."""
    log, handler = logging.getLogger("reccomp_hf.serving"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "answer OpenAI's chat completions over HTTP, without vLLM",
        "Serves one checkpoint: POST /v1/chat/completions, streaming or not, and GET /v1/models. Pictures come\n"
        "as data URLs or base64. Answers are made one after the other; a request may override settings by\n"
        'token_recovery={"budget": 64}. prompt_tokens counts what the language model reads; the header\n'
        "x-visual-tokens says how many of them stand for pictures. Needs transformers 5.12 or newer and\n"
        "pip install 'reccomp_hf[serve]'.",
        " ./llava-reccomp --budget 64",
        " demo --port 8001 --preset paper",
    )
    add_checkpoint(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 127.0.0.1 is reachable from this machine only"
    )
    command.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on, 0 for a free one")
    command.add_argument(
        "--allow-urls",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures that requests name by http(s) URLs of this host; may be repeated (none)",
    )
    add_model_options(command)


__all__ = ["names_of", "register", "run"]
