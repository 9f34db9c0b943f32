"""A temporary folder next to an output, and the removal of those that killed runs left."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where a folder with an open file cannot be removed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SUFFIX = ".unfinished"
"""End of the names of these folders."""
_ENDS = (SUFFIX, ".converting")  # the latter in version 0.1
_LOCK = ".lock"


@contextlib.contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A temporary folder next to the output, so that a rename publishes the result.

    A run holds a lock on its folder. Folders of earlier runs that were killed have none: they are removed, and a
    warning names them.
    """
    parent, prefix = output.absolute().parent, f".{output.name}-"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(parent.iterdir()):
        if leftover.name.startswith(prefix) and leftover.name.endswith(_ENDS):
            _remove(leftover)
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=parent))
    lock = (work / _LOCK).open("w")
    try:
        _acquire(lock)
        yield work
    finally:
        lock.close()
        shutil.rmtree(work, ignore_errors=True)


def _remove(leftover: Path) -> None:
    """Remove the folder of a killed run; that of a running one is left."""
    if leftover.is_symlink() or not leftover.is_dir():
        return
    try:
        with (leftover / _LOCK).open("a") as lock:
            if not _acquire(lock):
                logger.warning(f"{leftover} belongs to another run, which may still be at work. It is left alone.")
                return
            shutil.rmtree(leftover)
        logger.warning(f"{leftover} was left by a run that was killed; it is removed.")
    except OSError as error:
        logger.warning(f"{leftover} was left by another run and cannot be removed ({error}); remove it yourself.")


def _acquire(lock: IO[str]) -> bool:
    """Lock an open file until it is closed; false if another process may hold the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a disk without locks
        return False
    return True


__all__ = ["work_folder"]
