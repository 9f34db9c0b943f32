"""Calls of fast tokenizers that several threads share, whose padding and truncation are a state of all threads.

Each call sets them: another thread that encodes at that moment fails (4.57), or gets rows of the wrong length (5.x).
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

_LOCK = threading.RLock()


def _renew_lock() -> None:
    """A process that was forked has none of the threads that could release the lock."""
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def one_at_a_time(processor: Any) -> Any:
    """A copy of a processor for one call, with the processor's tokenizer as a [`OneAtATime`]."""
    own = copy.copy(processor)
    own.tokenizer = OneAtATime(processor.tokenizer)
    return own


class OneAtATime:
    """A tokenizer of which one call runs at a time, in all threads; in all else it is the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer."""
        with _LOCK:
            return self._tokenizer(*args, **kwargs)


def token_ids(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Tokens of texts, without padding or truncation, and without a warning about long ones.

    It waits for the calls of [`OneAtATime`], and leaves the padding as it is for callers that do not wait.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not texts:
        return []
    with _LOCK:
        if (
            backend is None
            or backend.truncation is not None
            or backend.encode_special_tokens != tokenizer.split_special_tokens
        ):
            return tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False).input_ids
        encoded = backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
    return [list(itertools.compress(row.ids, row.attention_mask)) for row in encoded]


__all__ = ["OneAtATime", "one_at_a_time", "token_ids"]
