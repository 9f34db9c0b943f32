"""An answer on its way from the model's thread to the client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from typing import Any

from .requests import ChatRequest


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request with its images compressed, ready for the language model.

    Attributes:
        prompt_tokens: Number of tokens in the shortened prompt.
        max_new_tokens: Number of tokens that may follow.
        visual_tokens: Number of image placeholders in it, newlines included.
        visual_tokens_before: The same number in the uncompressed prompt.
    """

    prompt_tokens: int
    max_new_tokens: int
    visual_tokens: int
    visual_tokens_before: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        text: The whole text.
        tokens: Number of generated tokens, the end token included.
        reason: `"length"` where `max_new_tokens` is reached, else `"stop"`.
    """

    text: str
    tokens: int
    reason: str


class Answer:
    """An answer on its way from the model's thread to the event loop in which it is created.

    Args:
        request: The request that it answers.
        seconds: Time until it is given up.
        key: Equal for requests of one batch; `None` for a request that is answered alone.
    """

    def __init__(self, request: ChatRequest, seconds: float = float("inf"), key: Any = None) -> None:
        self.request, self.key = request, key
        self.ends_at = time.monotonic() + seconds
        self.client_left, self.done = threading.Event(), threading.Event()
        self.prepared = False
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def ended(self) -> bool:
        """Whether the last item was sent."""
        return self.done.is_set()

    def send(self, item: Any) -> None:
        """Pass on the next item; called in the model's thread."""
        self.prepared = True
        with contextlib.suppress(RuntimeError):  # the loop is closed once the server has stopped
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def finish(self, text: str, tokens: int, reason: str) -> None:
        """Send the end, see [`Finished`]."""
        self.done.set()
        self.send(Finished(text, tokens, reason))

    def fail(self, error: Exception) -> None:
        """Send an error as the end."""
        self.done.set()
        self.send(error)

    async def receive(self) -> Any:
        """Wait for the next item: `Prepared`, pieces of text if the answer is streamed, and `Finished`.

        Raises:
            RequestError: Instead of `Prepared`: the chat template, the processor or the model refuses the request.
            CallEnded: The client has left, the time is over, or the server is stopping.
            Exception: The model fails.
        """
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item


__all__ = ["Answer", "Finished", "Prepared"]
