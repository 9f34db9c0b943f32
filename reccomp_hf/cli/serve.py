"""`reccomp-hf serve`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import Any

from .choices import SERVE_BATCH_SIZE as BATCH_SIZE
from .choices import SERVE_SECONDS as SECONDS
from .choices import SERVE_WAITING as WAITING
from .options import (
    add_address,
    add_checkpoint,
    add_command,
    add_cuda_graph,
    add_model_options,
    count,
    host_name,
    section_fields,
)
from .output import say

KEY_VARIABLE = "RECCOMP_HF_API_KEY"


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    _check_packages()
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..engines.server.answering import Service
    from ..engines.server.app import build_app
    from ..engines.server.guard import allowed_hosts
    from ..engines.server.images import ImageReader
    from ..engines.server.listening import Server, listen, url_of

    if arguments.api_key == "":
        raise ValueError("--api-key is empty: leave it out to require no key.")
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    listener = listen(arguments.host, arguments.port)  # before anything is loaded
    with listener, quiet(progress_bars=sys.stderr.isatty()):
        source = (arguments.model, section_fields(arguments), arguments.device, arguments.dtype)
        model, processor = load(*source, cuda_graph=arguments.cuda_graph)
        name, *aliases = names_of(arguments.model)
        limits = {"batch_size": arguments.batch_size, "waiting": arguments.queue, "seconds": arguments.timeout}
        service = Service(name, model, processor, aliases, **limits)
        address = listener.getsockname()[0]
        hosts = allowed_hosts(address, arguments.allow_host)
        server = Server(build_app(service, ImageReader(arguments.allow_urls), hosts, key), service)
        _log()
        say(f"Serving {name} on {url_of(listener)} (Ctrl-C ends it).")
        if key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            say("No API key is required: anyone who can reach this address can use it (see --api-key).")
        with contextlib.suppress(KeyboardInterrupt):  # raised again unless the shell has disabled it
            server.run(sockets=[listener])
        say("Stopped.")


def names_of(model: str) -> list[str]:
    """The names that clients may use for a model; the first one, a folder's own name, is listed."""
    bare = model.rstrip("/")
    listed = Path(os.path.abspath(model)).name if Path(model).is_dir() else model
    return list(dict.fromkeys(name for name in (listed, model, bare) if name))


def _check_packages() -> None:
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"reccomp-hf serve needs {' and '.join(missing)}: pip install 'reccomp_hf[serve]'.")


def _log() -> None:
    """Write the server's log to stderr, one line per entry."""
    log, handler = logging.getLogger("reccomp_hf.engines.server"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "answer OpenAI's chat completions over HTTP, without vLLM",
        "Serves one checkpoint: POST /v1/chat/completions, streaming or not, and GET /v1/models. Images come\n"
        "as data URLs or base64. Greedy requests that come at the same time are answered in one batch; a request may\n"
        'override settings with token_recovery={"budget": 64}. prompt_tokens counts what the language model reads;\n'
        "the header x-visual-tokens says how many of them stand for images. Needs pip install 'reccomp_hf[serve]'.",
        " ./llava-reccomp --budget 64",
        " demo --port 8001 --preset paper",
    )
    add_checkpoint(command)
    add_address(command, 8000)
    command.add_argument(
        "--allow-urls",
        type=host_name,
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images that requests give as http(s) URLs of this host; may be repeated (default: no host)",
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send; better in the variable {KEY_VARIABLE}, which other users cannot list",
    )
    command.add_argument(
        "--allow-host",
        type=host_name,
        action="append",
        default=[],
        metavar="NAME",
        help="answer requests to this host name, and of pages of this host; may be repeated (default: names of this "
        "machine on 127.0.0.1, any name on other addresses)",
    )
    command.add_argument(
        "--batch-size",
        type=count,
        default=BATCH_SIZE,
        metavar="N",
        help="most requests, and most images, that are answered together",
    )
    command.add_argument(
        "--queue", type=count, default=WAITING, metavar="N", help="most open requests; others get 429, try again"
    )
    command.add_argument(
        "--timeout", type=count, default=int(SECONDS), metavar="N", help="seconds until an answer is given up"
    )
    add_model_options(command)
    add_cuda_graph(command)


__all__ = ["names_of", "register", "run"]
