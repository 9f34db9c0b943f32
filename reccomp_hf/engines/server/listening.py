"""Where the server listens, and how it stops."""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .answering import Service

SECONDS_TO_FINISH = 3.0
"""Time that unfinished answers get when the server stops."""
IDLE_SECONDS = 15.0
"""Time in which a request's headers must arrive, and in which an open connection may wait for the next request."""


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes a free one.

    Raises:
        ValueError: The port is out of range.
        OSError: The address is not available; the message says why.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be from 0 (a free one) to 65535, got {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} of {host} is in use: choose another --port, or 0 for a free one",
            errno.EACCES: f"port {port} is reserved for privileged users: choose one above 1023",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this machine",
        }
        other = f"{host} is not a known host" if isinstance(error, socket.gaierror) else str(error)
        raise OSError(f"Cannot listen: {reasons.get(error.errno or 0, other)}.") from error


def url_of(listener: socket.socket) -> str:
    """The base URL for clients."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class _Protocol(H11Protocol):
    """A connection that is closed if no request arrives on it: uvicorn waits for headers without a limit."""

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._close_unless_busy()

    def _close_unless_busy(self, idle: bool = False) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if idle and waits:
            self.transport.close()
        elif not self.transport.is_closing():  # a request that comes meanwhile has from one to two such spans
            self.loop.call_later(IDLE_SECONDS, self._close_unless_busy, waits)


class Server(uvicorn.Server):
    """A uvicorn server that gives up unfinished answers soon after it is asked to stop.

    Args:
        app: The ASGI application.
        service: The service that answers its requests.
    """

    def __init__(self, app: Any, service: Service) -> None:
        seconds = int(SECONDS_TO_FINISH) + 5  # a prefill cannot be interrupted
        config = uvicorn.Config(
            app,
            http=_Protocol,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=seconds,
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop; called by a signal."""
        self._service.ends_at = min(self._service.ends_at, time.monotonic() + SECONDS_TO_FINISH)
        super().handle_exit(sig, frame)


__all__ = ["Server", "listen", "url_of"]
