"""The server's routes and the errors that they answer with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .answering import Service
from .answers import Answer, Prepared
from .errors import CallEnded, RequestError, error_body, too_busy
from .guard import Guard
from .images import PLACES, ImageReader
from .requests import ChatRequest, check_model, read_request
from .streaming import EventStream, completion_body

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20  # per request
_MAX_BYTES_TOGETHER = 512 << 20  # of all bodies that are being read
_SMALL = 2 << 20  # bytes of a body that is read nevertheless
_MAX_COMMAS = 100_000  # in a body: a list of tens of millions of numbers would take seconds and gigabytes to parse
_READERS = 4  # requests that are validated and decoded at once, besides downloads
BODY_SECONDS = 60.0
"""Time for the body of a request to arrive."""
_ROUTES = "POST /v1/chat/completions, GET /v1/models and GET /health"


def build_app(
    service: Service, open_image: ImageReader, hosts: frozenset[str] | None = None, key: str | None = None
) -> Starlette:
    """The ASGI application: OpenAI's chat completions, the list of the one model, and a health check.

    Args:
        service: Answers the requests.
        open_image: Opens the images of a request.
        hosts: Names by which clients may address the server, see `allowed_hosts`; `None` for any.
        key: The key that clients must send; `None` for no key.
    """
    routes = _Routes(service, open_image)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/health", routes.health),
        ],
        middleware=[Middleware(Guard, hosts, key)],
        exception_handlers={
            RequestError: _refused,
            HTTPException: _unknown,
            CallEnded: _ended,
            ClientDisconnect: _ended,  # while the request was being received
        },
    )


class _Routes:
    """The handlers; see `build_app` for the arguments."""

    def __init__(self, service: Service, open_image: ImageReader) -> None:
        self.service, self.open_image = service, open_image
        # Downloads from one host cannot take all threads, so that requests without any always find a free one.
        self._readers = ThreadPoolExecutor(_READERS + PLACES * len(open_image.hosts), thread_name_prefix="reader")
        self._bytes = 0  # of all bodies that are being read
        self.entry = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "reccomp_hf"}

    async def chat(self, request: Request) -> Response:
        """Answer a chat request, streaming or not."""
        self.service.check_load()
        chat_request = await self._read_request(request)
        answer = self.service.submit(chat_request)
        try:
            async with _watch_client(request, answer):
                return await self._respond(answer)
        except (RequestError, CallEnded):
            raise
        except Exception as error:  # handled by Starlette, it would also close the client's connection
            logger.exception("The server failed.")
            message = f"The server failed: {type(error).__name__}. See the server's log."
            return JSONResponse(error_body(message, 500), 500)

    async def _read_request(self, request: Request) -> ChatRequest:
        """Receive and validate a request and open its images, in threads of their own."""
        body = bytearray()
        try:
            await asyncio.wait_for(self._receive(request, body), BODY_SECONDS)
            read = functools.partial(_parse, body, self.service.names, self.open_image.for_request())
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        except asyncio.TimeoutError as error:
            message = f"The body did not arrive within {BODY_SECONDS:g} seconds."
            raise RequestError(message, 408, headers={"connection": "close"}) from error
        finally:
            self._bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        async for chunk in request.stream():
            body += chunk
            self._bytes += len(chunk)
            if len(body) > _MAX_BYTES:
                raise RequestError(f"The request is larger than {_MAX_BYTES:,} bytes: send smaller images.", 413)
            if len(body) > _SMALL and self._bytes > _MAX_BYTES_TOGETHER:
                raise too_busy("Many large requests are being received")

    async def _respond(self, answer: Answer) -> Response:
        start = time.monotonic()
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.service.name}
        prepared: Prepared = await answer.receive()
        logger.info(
            "%s: %d of %d visual tokens, prompt of %d tokens, after %.2f s",
            head["id"],
            prepared.visual_tokens,
            prepared.visual_tokens_before,
            prepared.prompt_tokens,
            time.monotonic() - start,
        )
        headers = {
            "x-visual-tokens": str(prepared.visual_tokens),
            "x-visual-tokens-uncompressed": str(prepared.visual_tokens_before),
        }
        if answer.request.stream:
            return EventStream(answer, prepared, head, headers)
        return JSONResponse(completion_body(head, prepared, await answer.receive()), headers=headers)

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self.entry]})

    async def model(self, request: Request) -> Response:
        """Describe the one model, under any of its names."""
        check_model(request.path_params["name"], self.service.names)
        return JSONResponse(self.entry)

    async def health(self, request: Request) -> Response:
        """Report that the server is up."""
        return JSONResponse({"status": "ok"})


@contextlib.asynccontextmanager
async def _watch_client(request: Request, answer: Answer) -> AsyncIterator[None]:
    """Notice a client that leaves before the response begins."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.client_left.set()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _parse(body: bytearray, models: tuple[str, ...], open_image: Callable[[str, str], Image.Image]) -> ChatRequest:
    """Parse and validate a body, see `read_request`."""
    if body.count(b",") > _MAX_COMMAS:
        raise RequestError("The body has too many values.", 413)
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"The body is not JSON: {reason}.") from error
    return read_request(parsed, models, open_image)


def _refused(request: Request, error: Any) -> Response:
    logger.info("%d: %s", error.status, error)
    return JSONResponse(error_body(str(error), error.status, error.code), error.status, error.headers)


def _unknown(request: Request, error: Any) -> Response:
    status, detail = error.status_code, error.detail
    if status in (404, 405):
        detail = f"There is no {request.method} {request.url.path} here; this server answers {_ROUTES}."
    return JSONResponse(error_body(detail, status), status, error.headers)


def _ended(request: Request, error: Exception) -> Response:
    status = getattr(error, "status", 503)
    return JSONResponse(error_body(str(error), status), status)


__all__ = ["build_app"]
