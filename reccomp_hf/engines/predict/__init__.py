"""Answers to many questions: batches of similar length, any number of processes, and runs that go on after a kill."""

from .questions import Columns
from .running import DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS, Prediction, checked_rows, predict, process_state

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_NEW_TOKENS",
    "Columns",
    "Prediction",
    "checked_rows",
    "predict",
    "process_state",
]
