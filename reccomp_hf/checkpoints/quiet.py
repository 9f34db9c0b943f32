"""Silencing transformers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from transformers.utils import logging

from ..data.shared_setting import SharedSetting


@contextlib.contextmanager
def quiet(progress_bars: bool = False) -> Iterator[None]:
    """Suppress transformers' log lines below errors, and its progress bars unless `progress_bars` is true."""
    with _NO_WARNINGS, contextlib.nullcontext() if progress_bars else _NO_BARS:
        yield


def _silence() -> Callable[[], None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    return functools.partial(logging.set_verbosity, before)


def _hide_bars() -> Callable[[], None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    return logging.enable_progress_bar if shown else lambda: None


_NO_WARNINGS, _NO_BARS = SharedSetting(_silence), SharedSetting(_hide_bars)

__all__ = ["quiet"]
