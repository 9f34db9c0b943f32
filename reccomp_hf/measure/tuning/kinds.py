"""Kinds of questions, by the words they begin with."""

from __future__ import annotations

import string
from collections.abc import Sequence

from ...core.rules import plain_question

_WORDS = 2


def beginning(question: str) -> str:
    """The first two words of a question, as rules compare them, without punctuation at their end."""
    return " ".join(plain_question(question).split()[:_WORDS]).rstrip(string.punctuation)


def beginnings(questions: Sequence[str]) -> list[str]:
    """The beginning of every question."""
    return [beginning(question) for question in questions]


__all__ = ["beginning", "beginnings"]
