"""The words of a question as LLaVA's own tokens, for methods that compare them with projected patches.

The filter is that of MMTok (Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
ICLR 2026, arXiv 2508.18264).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .questions import ANSWER_INSTRUCTIONS
from .tensors import round_up
from .tokenizing import token_ids

STOP_WORDS = frozenset(
    (
        *("a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had", "do", "does"),
        *("did", "it", "they", "he", "she", "we", "you", "i", "what", "where", "when", "why", "how", "who", "which"),
        *("and", "or", "but", "so", "if", "then", "question", "answer", "to", "for", "with", "by", "from", "at"),
        *("into", "onto", "upon"),
    )
)
"""Words of a question that are not read."""
NO_WORD = -1
"""The padding behind a row's tokens."""

_STEP = 32
_WORD = re.compile(r"\b\w+\b")


def content_words(question: str) -> list[str]:
    """The words of a question that are read: all but stop words and answer instructions, without punctuation.

    A question of stop words alone is split at white space instead, so that only an empty one has no words.
    """
    for instruction in ANSWER_INSTRUCTIONS:
        question = question.replace(instruction, "")
    words = [word for word in _WORD.findall(question) if word.lower() not in STOP_WORDS]
    return words or question.split()


def encode_words(tokenizer: Any, questions: Sequence[str | Sequence[str]]) -> np.ndarray:
    """Tokens of the questions' words, each word by itself and without special tokens.

    Args:
        tokenizer: The language model's.
        questions: One question, or a list of them, whose words follow each other, per row.

    Returns:
        int64 (rows, length), padded on the right with `NO_WORD` to a multiple of 32, so that most batches have one
        shape.
    """
    rows = [
        [word for text in ([row] if isinstance(row, str) else row) for word in content_words(text)]
        for row in questions
    ]
    words = list(dict.fromkeys(word for row in rows for word in row))
    encoded = token_ids(tokenizer, words)
    ids = dict(zip(words, encoded, strict=True))
    tokens = [[token for word in row for token in ids[word]] for row in rows]
    longest = max(1, *map(len, tokens)) if tokens else 1
    table = np.full((len(rows), round_up(longest, _STEP)), NO_WORD, dtype=np.int64)
    for row, own in enumerate(tokens):
        table[row, : len(own)] = own
    return table


__all__ = ["NO_WORD", "STOP_WORDS", "content_words", "encode_words"]
