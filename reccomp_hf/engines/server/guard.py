"""Checks of a request's headers, before anything of it is read."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import error_body

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def allowed_hosts(address: str, names: Iterable[str]) -> frozenset[str] | None:
    """Names by which clients may address the server; `None` for any name.

    A server that only this machine reaches answers only to names of this machine: otherwise a web page whose name is
    made to point at 127.0.0.1 could use it through the browser of whoever opens the page (DNS rebinding).

    Args:
        address: The address that the server listens on.
        names: Further names that the user allows.
    """
    given = [name.lower() for name in names]
    if not given and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return None
    return frozenset([*LOOPBACK, address, *given])


def foreign_name(headers: Headers, hosts: frozenset[str] | None) -> str | None:
    """The refusal of a request to another host or of another site; `None` for one that is allowed."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if hosts is not None and _name(f"//{host}") not in hosts:
        return f"This server does not answer to the host {host[:80]!r}: start it with --allow-host NAME."
    if hosts is not None and origin is not None and _name(origin) not in hosts:
        return f"Pages of {origin[:80]!r} may not use this server: start it with --allow-host NAME."
    return None


class Guard:
    """Refuses requests to another host or of another site, without the key, or of another content type.

    Args:
        app: The application behind it.
        hosts: Names that the headers Host and Origin may have; `None` for any.
        key: The key that clients send as a bearer token; `None` for no key. `/health` needs none.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None, key: str | None = None) -> None:
        self._app, self._hosts, self._key = app, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, message = refusal
        headers = {"www-authenticate": "Bearer"} if status == 401 else {}
        await JSONResponse(error_body(message, status), status, {**headers, "connection": "close"})(
            scope, receive, send
        )

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        foreign = foreign_name(headers, self._hosts)
        if foreign is not None:
            return 403, foreign
        if self._key is not None and scope["path"] != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self._key.encode()):
                return 401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`."
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return 415, f"The body must be of type application/json, got {kind[:80]!r}."
        return None


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


__all__ = ["LOOPBACK", "Guard", "allowed_hosts", "foreign_name"]
