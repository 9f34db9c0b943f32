"""Defaults of `predict` and of its command line, which reads them without importing torch."""

DEFAULT_BATCH_SIZE = 16
DEFAULT_NEW_TOKENS = 64
DEFAULT_ID_COLUMN = "id"

__all__ = ["DEFAULT_BATCH_SIZE", "DEFAULT_ID_COLUMN", "DEFAULT_NEW_TOKENS"]
