"""The progress bar of long work."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, progress: bool | None = None) -> Any:
    """Open a progress bar on stderr.

    Args:
        total: Number of steps.
        description: A word or two in front of the bar.
        progress: Whether to show it; `None` shows it where stderr is a terminal.

    Returns:
        A `tqdm` bar: a context manager with `update`.
    """
    disable = None if progress is None else not progress
    return tqdm(total=total, desc=description, file=sys.stderr, disable=disable)


__all__ = ["progress_bar"]
