"""The code that a checkpoint carries: configuration, methods, models and processors."""

__version__ = "0.1.0"
