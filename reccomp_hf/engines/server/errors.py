"""Errors returned to HTTP clients."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request that cannot be answered.

    Args:
        message: A sentence: what is wrong, what was received, what to do.
        status: HTTP status code.
        code: OpenAI's error code, if there is one.
        headers: HTTP headers of the response.
    """

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class CallEnded(RuntimeError):
    """Nobody waits for the rest of the answer: the client has left, its time is over, or the server is stopping.

    Args:
        message: A sentence.
        status: HTTP status code.
    """

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """The body of an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


__all__ = ["CallEnded", "RequestError", "error_body"]
