"""Answers to many questions: batches of similar length, any number of processes, and runs that resume after a kill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .defaults import DEFAULT_BATCH_SIZE, DEFAULT_ID_COLUMN, DEFAULT_NEW_TOKENS

if TYPE_CHECKING:
    from .processes import process_state
    from .questions import Columns
    from .running import Prediction, open_data, predict, predict_by

_MODULES = {
    "Columns": "questions",
    "Prediction": "running",
    "open_data": "running",
    "predict": "running",
    "predict_by": "running",
    "process_state": "processes",
}


def __getattr__(name: str) -> Any:
    """Import torch and the rest only for a name that needs them: the command line reads the defaults alone."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_ID_COLUMN",
    "DEFAULT_NEW_TOKENS",
    "Columns",
    "Prediction",
    "open_data",
    "predict",
    "predict_by",
    "process_state",
]
