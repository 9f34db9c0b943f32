"""The rows of a batch while `generate` runs: each ends by its own limits and sends its text by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .errors import CallEnded

if TYPE_CHECKING:
    from .answering import Answer


class Row:
    """An answer that is being generated.

    Args:
        answer: Receives the pieces of text of a stream, and the end.
        max_new_tokens: Number of tokens that end it.
        end_tokens: Ids that end it.
        decode: Turns token ids into text.
    """

    def __init__(
        self,
        answer: Answer,
        max_new_tokens: int,
        end_tokens: Collection[int],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.answer = answer
        self._max_new_tokens, self._end_tokens, self._decode = max_new_tokens, end_tokens, decode
        self._ids: list[int] = []
        self._pieces = Pieces(decode, answer.send) if answer.request.stream else None

    def take(self, token: int) -> None:
        """Add a token; ends the answer where it is the last one."""
        self._ids.append(token)
        if self._pieces is not None:
            self._pieces.add(token)
        if token in self._end_tokens or self._has_stop_string():
            self._end("stop")
        elif len(self._ids) >= self._max_new_tokens:
            self._end("length")

    def _has_stop_string(self) -> bool:
        stops = self.answer.request.stop
        text = self._decode(self._ids) if stops else ""
        return any(stop in text for stop in stops)

    def _end(self, reason: str) -> None:
        if self._pieces is not None:
            self._pieces.end()
        self.answer.finish(self._decode(self._ids), len(self._ids), reason)


class Rows(StoppingCriteria):
    """Passes each new token to its row, and ends the rows that are done or that nobody waits for.

    Args:
        rows: One for each row of the batch.
        check_wanted: Raises [`CallEnded`] for an answer that nobody waits for.
    """

    def __init__(self, rows: Sequence[Row], check_wanted: Callable[[Answer], None]) -> None:
        self._rows, self._check_wanted = rows, check_wanted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(R,) bool, true for rows that are done."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.answer.ended:
                continue
            try:
                self._check_wanted(row.answer)
                row.take(token)
            except CallEnded as error:
                row.answer.fail(error)
        return torch.tensor([row.answer.ended for row in self._rows], device=input_ids.device)


class Pieces:
    """Decodes tokens as they come and sends the text that they add; together the pieces are the whole text.

    Args:
        decode: Turns token ids into text.
        send: Receives each piece; a character of several tokens comes with its last one.
    """

    def __init__(self, decode: Callable[[list[int]], str], send: Callable[[str], None]) -> None:
        self._decode, self._send = decode, send
        self._ids: list[int] = []
        self._start = self._end = 0  # ids before `end` are sent; those from `start` on are decoded with the next ones

    def add(self, token: int) -> None:
        """Take the next token."""
        self._ids.append(token)
        self._flush(final=False)

    def end(self) -> None:
        """Send what is left."""
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        # Decoded with the piece before: whether a piece begins with a space depends on what precedes it.
        sent, text = self._decode(self._ids[self._start : self._end]), self._decode(self._ids[self._start :])
        if len(text) <= len(sent) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return
        self._start, self._end = self._end, len(self._ids)
        self._send(text[len(sent) :])


__all__ = ["Pieces", "Row", "Rows"]
