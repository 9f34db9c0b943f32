"""What a client is told."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request that cannot be answered.

    Args:
        message: A sentence: what is wrong, what was received, what to do.
        status: Of HTTP.
        code: OpenAI's word for it, where there is one.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class CallEnded(RuntimeError):
    """The client is gone, or the server is being stopped: nobody waits for the rest of the answer."""


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """The body of an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


__all__ = ["CallEnded", "RequestError", "error_body"]
