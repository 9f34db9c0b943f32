"""Kinds of questions, by the words they begin with."""

from __future__ import annotations

import string
from collections.abc import Sequence

_WORDS = 2
_AROUND = string.punctuation + string.whitespace


def beginning(question: str) -> str:
    """The first two words of a question, case-folded, without punctuation around them."""
    words = [word for word in question.casefold().lstrip(_AROUND).split()[:_WORDS] if word]
    return " ".join(words).rstrip(_AROUND)


def beginnings(questions: Sequence[str]) -> list[str]:
    """The beginning of every question."""
    return [beginning(question) for question in questions]


__all__ = ["beginning", "beginnings"]
