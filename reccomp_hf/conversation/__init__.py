"""Several questions about one image."""

from .conversation import MODES, Conversation

__all__ = ["MODES", "Conversation"]
