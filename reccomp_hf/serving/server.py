"""The HTTP server: its addresses, its errors, its beginning and its end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from .answering import Service
from .errors import CallEnded, RequestError, error_body
from .pictures import PictureReader
from .requests import check_model, read_request

logger = logging.getLogger(__name__)

SECONDS_TO_FINISH = 3.0
"""For answers that are being made when the server is stopped."""
_MOST_BYTES = 64 << 20  # of a request
_ADDRESSES = "POST /v1/chat/completions, GET /v1/models and GET /health"


def build_app(service: Service, open_picture: PictureReader) -> Any:
    """The ASGI application: chat completions as OpenAI's, the list of the one model, and a sign of life.

    Args:
        service: What answers.
        open_picture: What reads the pictures of a request.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    entry = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "reccomp_hf"}

    async def chat(request: Request) -> Response:
        body = await _json_of(request)
        asked = await asyncio.to_thread(read_request, body, service.names, open_picture)
        gone = threading.Event()
        try:
            return await _while_there(request, service.answer(asked, f"chatcmpl-{uuid.uuid4().hex}", gone), gone)
        except (RequestError, CallEnded, HTTPException):
            raise
        except Exception as error:  # left to Starlette, it would cost the client its connection too
            logger.exception("The server failed.")
            message = f"The server failed: {type(error).__name__}. Its log says more."
            return JSONResponse(error_body(message, 500), 500)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        check_model(request.path_params["name"], service.names)
        return JSONResponse(entry)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def refused(request: Request, error: Any) -> Response:
        logger.info("%d: %s", error.status, error)
        return JSONResponse(error_body(str(error), error.status, error.code), error.status)

    def unknown(request: Request, error: Any) -> Response:
        status, detail = error.status_code, error.detail
        if status in (404, 405):
            detail = f"There is no {request.method} {request.url.path} here; this server answers {_ADDRESSES}."
        return JSONResponse(error_body(detail, status), status, error.headers)

    def ended(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(str(error), 503), 503)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
        ],
        exception_handlers={
            RequestError: refused,
            HTTPException: unknown,
            CallEnded: ended,
            ClientDisconnect: ended,  # while it was sending
        },
    )


async def _json_of(request: Any) -> Any:
    """The body of a request."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise RequestError(f"The request is larger than {_MOST_BYTES:,} bytes: send smaller pictures.", 413)
    try:
        return await asyncio.to_thread(json.loads, bytes(body))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"The body is not JSON: {reason}.") from error


async def _while_there(request: Any, answer: Coroutine[Any, Any, Any], gone: threading.Event) -> Any:
    """Wait for an answer, and set `gone` where the client does not any more."""
    from starlette.background import BackgroundTask

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    listener = asyncio.ensure_future(disconnected())
    try:
        response = await answer
    finally:
        listener.cancel()
    response.background = BackgroundTask(gone.set)  # a stream ends, by itself or because it is read no more
    return response


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ValueError: No port.
        OSError: The address cannot be had; the message says why.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be from 0 (a free one) to 65535, got {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} of {host} is in use: choose another --port, or 0 for a free one",
            errno.EACCES: f"port {port} is not for ordinary users: choose one above 1023",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine",
        }
        unknown = f"{host} is no known host" if isinstance(error, socket.gaierror) else str(error)
        raise OSError(f"Cannot listen: {reasons.get(error.errno or 0, unknown)}.") from error


def url_of(listener: socket.socket) -> str:
    """Where clients find the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def http_server(app: Any, service: Service) -> Any:
    """A uvicorn server, which ends running answers soon after it is told to stop."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            service.ends_at = min(service.ends_at, time.monotonic() + SECONDS_TO_FINISH)
            super().handle_exit(sig, frame)

    seconds = int(SECONDS_TO_FINISH) + 5  # a prefill cannot be interrupted
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=seconds
    )
    return Server(config)


__all__ = ["build_app", "http_server", "listen", "url_of"]
