"""Opening the page on a port, without anything of Gradio that leaves the machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when Gradio is imported.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

from starlette.middleware import Middleware

from ..server.guard import allowed_hosts
from ..server.listening import listen, url_of
from .gate import Gate
from .limits import MAX_BYTES, MAX_VISITORS
from .talks import Talks


@contextlib.contextmanager
def open_page(
    talks: Talks, name: str, host: str = "127.0.0.1", port: int = 7860, allow_hosts: tuple[str, ...] = ()
) -> Iterator[tuple[Any, str]]:
    """Serve the page until the block ends; visitors' pictures are deleted then.

    Args:
        talks: Answers the questions.
        name: Name of the model, for the title.
        host: Address to listen on.
        port: Port to listen on, 0 for a free one.
        allow_hosts: Further names by which the page may be addressed.

    Yields:
        Gradio's page, and its address.

    Raises:
        ValueError: The port is out of range.
        OSError: The address is not available; the message says why.
    """
    with listen(host, port) as listener:  # says what is wrong; Gradio then opens the port itself
        address, found = listener.getsockname()[:2]
        url = url_of(listener).removesuffix("/v1")
    from .look import CSS, theme
    from .page import build_page

    with tempfile.TemporaryDirectory(prefix="reccomp-app-") as folder, _variable("GRADIO_TEMP_DIR", folder):
        page = build_page(talks, name, Path(folder))
        gate = Middleware(Gate, folder=Path(folder), hosts=allowed_hosts(address, allow_hosts))
        page.launch(
            server_name=address,
            server_port=found,
            share=False,
            quiet=True,
            inline=False,
            prevent_thread_lock=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            max_file_size=MAX_BYTES,
            enable_monitoring=False,
            state_session_capacity=MAX_VISITORS,
            strict_cors=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=theme(),
            css=CSS,
        )
        try:
            yield page, url
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


__all__ = ["open_page"]
