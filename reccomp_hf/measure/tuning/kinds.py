"""Kinds of questions, by the words they begin with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...core.rules import LONGEST_BEGINNING, in_word, is_unspaced, plain_question

NO_GROUP = ""
"""The group of questions that no rule is made for."""


def beginning(question: str) -> str:
    """The first two words of a question, as rules compare them.

    A rule with these words fits the questions of this group alone. So `NO_GROUP` is returned for a single word, with
    which other groups might begin too, for writing without spaces, and for words that are too long for a rule.
    """
    first, _, rest = plain_question(question).partition(" ")
    second = "".join(itertools.takewhile(in_word, rest))
    words = f"{first} {second}"
    fits = second and len(words) <= LONGEST_BEGINNING and not is_unspaced(words[-1])
    return words if fits else NO_GROUP


def beginnings(questions: Sequence[str]) -> list[str]:
    """The beginning of every question."""
    return [beginning(question) for question in questions]


__all__ = ["NO_GROUP", "beginning", "beginnings"]
