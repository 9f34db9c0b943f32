"""Chat completions in OpenAI's format: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import Answer, Finished, Prepared
from .errors import CallEnded

logger = logging.getLogger(__name__)


def completion_body(head: Mapping[str, Any], prepared: Prepared, finished: Finished) -> dict[str, Any]:
    """The body of an answer that is not streamed.

    Args:
        head: The answer's `id`, `created` and `model`.
        prepared: The request.
        finished: The end of its answer.
    """
    message = {"role": "assistant", "content": finished.text}
    choice = {"index": 0, "message": message, "finish_reason": finished.reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(prepared, finished)}


class EventStream(StreamingResponse):
    """An answer sent while it is generated, which ends when the client leaves.

    Args:
        answer: The answer, of which the first item is read.
        prepared: That item.
        head: The answer's `id`, `created` and `model`.
        headers: HTTP headers.
    """

    def __init__(
        self, answer: Answer, prepared: Prepared, head: Mapping[str, Any], headers: Mapping[str, str]
    ) -> None:
        super().__init__(_events(answer, prepared, head), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.client_left.set()


async def _events(answer: Answer, prepared: Prepared, head: Mapping[str, Any]) -> AsyncIterator[str]:
    """The events of a stream; `[DONE]` ends it, or an error that comes after the HTTP status was sent."""

    def chunk(choice: dict[str, Any], **fields: Any) -> str:
        fields = {**head, "object": "chat.completion.chunk", "choices": [{"index": 0, **choice}], **fields}
        return _event({**fields, "system_fingerprint": ""})

    yield chunk({"delta": {"role": "assistant"}})
    try:
        while isinstance(item := await answer.receive(), str):
            yield chunk({"delta": {"content": item}})
        yield chunk({"delta": {}, "finish_reason": item.reason}, usage=_usage(prepared, item))
    except Exception as error:
        if not isinstance(error, CallEnded):
            logger.error("The answer ends here.", exc_info=error)
        yield _event({"error": " ".join(str(error).split())})
        return
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _usage(prepared: Prepared, finished: Finished) -> dict[str, int]:
    read, written = prepared.prompt_tokens, finished.tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


__all__ = ["EventStream", "completion_body"]
