"""Tuning: the setting that keeps a model's own answers, found on questions without answers."""

from .goal import Goal
from .measuring import Measurement, jensen_shannon
from .plotting import plot_tuning
from .result import Contender, Tuning
from .running import DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS, tune

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_NEW_TOKENS",
    "Contender",
    "Goal",
    "Measurement",
    "Tuning",
    "jensen_shannon",
    "plot_tuning",
    "tune",
]
