"""The server's routes and the errors that they answer with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .answering import Answer, Prepared, Service
from .errors import CallEnded, RequestError, error_body
from .guard import Guard
from .images import ImageReader
from .requests import ChatRequest, check_model, read_request
from .streaming import EventStream, completion_body

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20  # per request
_MAX_COMMAS = 1_000_000  # in a body: a list of tens of millions of numbers would take seconds and gigabytes to parse
_DOWNLOADS = 32  # requests whose images are fetched at once
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
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="download")
        self.entry = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "reccomp_hf"}

    async def chat(self, request: Request) -> Response:
        """Answer a chat request, streaming or not."""
        self.service.check_load()
        body = await _read_json(request)
        chat_request = await self._read_request(body)
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

    async def _read_request(self, body: Any) -> ChatRequest:
        """Validate a request and open its images, with downloads in threads of their own."""
        read = functools.partial(read_request, body, self.service.names, self.open_image)
        threads = self._downloads if self.open_image.hosts else None
        return await asyncio.get_running_loop().run_in_executor(threads, read)

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


async def _read_json(request: Request) -> Any:
    """The parsed body of a request."""
    try:
        body = await asyncio.wait_for(_read_body(request), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        message = f"The body did not arrive within {BODY_SECONDS:g} seconds."
        raise RequestError(message, 408, headers={"connection": "close"}) from error
    if body.count(b",") > _MAX_COMMAS:
        raise RequestError("The body has too many values.", 413)
    try:
        return await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"The body is not JSON: {reason}.") from error


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            raise RequestError(f"The request is larger than {_MAX_BYTES:,} bytes: send smaller images.", 413)
    return bytes(body)


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
