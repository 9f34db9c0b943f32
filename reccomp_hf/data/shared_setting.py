"""Settings of the whole process that several threads change for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SharedSetting:
    """A context that changes a setting of the process for as long as any thread is in it.

    If each thread restored what it found, one that came second would restore the changed setting for good.

    Args:
        change: Makes the change, and returns a function that takes it back.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change, self._lock, self._inside = change, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._restore = self._change()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._restore()


__all__ = ["SharedSetting"]
