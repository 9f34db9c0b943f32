"""ASGI middleware for vLLM's server, which ignores the fields of a body that it does not know."""

from __future__ import annotations

import json
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .checks import check_body

MAX_BYTES = 64 << 20
"""Most bytes of a body, as in `reccomp-hf serve`."""
_CHATS = ("/chat/completions", "/chat/completions/batch", "/responses")
_ROUTES = (*_CHATS, "/completions")


class FieldCheck:
    """Answers a request with a misplaced or misspelt field of token recovery with 400, see `check_body`.

    The body is read and checked when vLLM asks for it, after it has checked a client's key. FastAPI passes on the
    `HTTPException` of a middleware, and vLLM answers it in OpenAI's form. A body that is not JSON, and responses,
    streaming ones included, are left to vLLM.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body to be checked if it is one for an answer."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(_ROUTES):
            receive = _checked(receive, pictures=scope["path"].endswith(_CHATS))
        await self._app(scope, receive, send)


def _checked(receive: Receive, *, pictures: bool) -> Receive:
    """A `receive` whose first message is the whole body; it raises where the body is refused."""
    first = True

    async def receive_checked() -> Message:
        nonlocal first
        if not first:
            return await receive()
        first = False
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return message  # the client has left
            chunks.append(message.get("body", b""))
            size, more = size + len(chunks[-1]), message.get("more_body", False)
            if size > MAX_BYTES:
                raise HTTPException(413, f"The request is larger than {MAX_BYTES:,} bytes: send smaller images.")
        body = b"".join(chunks)
        try:
            check_body(_parsed(body), pictures=pictures)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_checked


def _parsed(body: bytes) -> Any:
    """The value of a body; `None` for one that is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


__all__ = ["MAX_BYTES", "FieldCheck"]
