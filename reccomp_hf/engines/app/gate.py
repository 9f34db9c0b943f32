"""Checks of a request to the page: few routes, small bodies, no file but the visitors' pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..server.guard import foreign_name
from .limits import MAX_BYTES

_API = "/gradio_api"
_FILE = re.compile(rf"{_API}/file=(.*)", re.DOTALL)
_ROUTES = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/.*|"
    rf"{_API}/(queue/(join|data)|upload|upload_progress|heartbeat/[^/]+|startup-events|theme\.css|cancel|file=.*)",
    re.DOTALL,
)
_UPLOADS = (f"{_API}/upload",)
_MAX_REQUEST = 100_000
"""Bytes of a request other than an upload: settings and a question."""
_ROOM = 10_000
"""Bytes of an upload around the picture."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)
"""Gradio's own files alone: a browser fetches no script, font or picture from another host."""


class Gate:
    """Lets through the requests that the page makes, and refuses the rest of Gradio's interface.

    Gradio by itself would also fetch a URL for a visitor, and serve any file that a component names. Here a request
    reads files of `folder` alone, whatever Gradio allows.

    Args:
        app: The application behind it.
        folder: The folder of uploads.
        hosts: Names by which the page may be addressed; `None` for any, see [`reccomp_hf.engines.server.guard`].
    """

    def __init__(self, app: ASGIApp, folder: Path, hosts: frozenset[str] | None = None) -> None:
        self._app, self._folder, self._hosts = app, folder.resolve(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a sentence."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal, receive = await self._check(scope, receive)
        if refusal is not None:
            status, message = refusal
            await PlainTextResponse(message, status, {"connection": "close"})(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = _POLICY
                headers["referrer-policy"] = "no-referrer"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, send_with_policy)

    async def _check(self, scope: Any, receive: Receive) -> tuple[tuple[int, str] | None, Receive]:
        """The refusal of a request, and a `receive` that returns a body which was read for the check."""
        headers, path = Headers(scope=scope), scope["path"]
        foreign = foreign_name(headers, self._hosts)
        if foreign is not None:
            return (403, foreign), receive
        if not _ROUTES.fullmatch(path):
            return (404, "This page has nothing there."), receive
        file = _FILE.fullmatch(path)
        if file and not self._inside(file[1]):
            return (403, "This page serves only the pictures of its visitors."), receive
        if scope["method"] in ("GET", "HEAD"):
            return None, receive
        length = headers.get("content-length", "")
        most = MAX_BYTES + _ROOM if path in _UPLOADS else _MAX_REQUEST
        if not length.isdecimal() or int(length) > most:
            return (413, f"A request may have {most:,} bytes; a picture may have {MAX_BYTES >> 20} MB."), receive
        if path in _UPLOADS:
            return None, receive
        body, receive = await _read(receive)
        try:
            named = list(_paths(json.loads(body or b"{}")))
        except (ValueError, RecursionError):
            return (400, "The request is not JSON."), receive
        if not all(isinstance(name, str) and self._inside(name) for name in named):
            return (403, "A request may name only pictures that were uploaded."), receive
        return None, receive

    def _inside(self, name: str) -> bool:
        """Whether a path lies in the folder of uploads, as it is written and decoded once more."""
        for path in (name, unquote(name)):
            try:
                if not Path(os.path.realpath(path)).is_relative_to(self._folder):
                    return False
            except (OSError, ValueError):  # a null byte, a name that is too long
                return False
        return True


def _paths(value: Any) -> Iterator[Any]:
    """Every value of a key `path` in a JSON value, where Gradio looks for files."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "path" and inner is not None:
                yield inner
            yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A body, which its content-length bounds, and a `receive` that starts with it."""
    body, messages = bytearray(), []
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body"):
            break

    async def replay() -> Message:
        return messages.pop(0) if messages else await receive()

    return bytes(body), replay


__all__ = ["Gate"]
