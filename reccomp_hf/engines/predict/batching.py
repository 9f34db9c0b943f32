"""Batches of questions of similar length, the same in every run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

from ...core.checks import is_tiled
from ...core.counting import compressed_tokens, picture_tokens
from ...core.rules import NO_RULE, find_rule
from ...core.tokenizing import token_ids
from ...data.rows import Picture
from .questions import BadRow, Questions, RowQuestion

_TOKENIZED_AT_ONCE = 4096

Batch = list[int]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """All rows of the data, divided into batches and bad rows.

    Attributes:
        batches: Rows that are read together, the longest first.
        bad_rows: Rows that cannot be asked, as far as this shows before images are opened.
    """

    batches: list[Batch]
    bad_rows: list[BadRow]


def plan_batches(questions: Questions, config: Any, section: Any, processor: Any, batch_size: int) -> BatchPlan:
    """Group rows of similar length.

    The length of a row is its text in tokens plus about the number of visual tokens of its images, for which the
    header of an image is read where its size matters. A question that leaves no position for an answer by itself is a
    bad row.
    """
    lengths: dict[int, int] = {}
    bad_rows: list[BadRow] = []
    limit, rules = position_limit(config), range(NO_RULE, len(section.rules))
    visual_tokens = {rule: _visual_token_estimate(config, section.of_rule(rule)) for rule in rules}
    rows = iter(questions)
    while chunk := list(itertools.islice(rows, _TOKENIZED_AT_ONCE)):
        good = [row for row in chunk if isinstance(row, RowQuestion)]
        bad_rows += [row for row in chunk if isinstance(row, BadRow)]
        texts = [question.text for question in good]
        for question, tokens in zip(good, token_ids(processor.tokenizer, texts), strict=True):
            try:
                check_length(len(tokens), limit)
            except ValueError as error:
                bad_rows.append(questions.bad_row(question.row, question.id, error))
            else:
                rule = find_rule(section.rules, question.clip_texts)
                lengths[question.row] = len(tokens) + sum(map(visual_tokens[rule], question.pictures))
    order = sorted(lengths, key=lambda row: (-lengths[row], row))
    return BatchPlan([order[start : start + batch_size] for start in range(0, len(order), batch_size)], bad_rows)


def position_limit(config: Any) -> int:
    """Number of positions of the language model, the largest int where its config has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_length(positions: int, limit: int) -> None:
    """Refuse a prompt that leaves no position for an answer.

    Raises:
        ValueError: The prompt takes all positions or more.
    """
    if positions >= limit:
        raise ValueError(
            f"the prompt takes {positions} of the model's {limit} positions, and leaves none for an answer: "
            "shorten the question, or set a smaller token_recovery.budget."
        )


def _visual_token_estimate(config: Any, section: Any) -> Callable[[Picture], int]:
    """A function that estimates an image's visual tokens, newlines included."""
    side = config.vision_config.image_size
    share = compressed_tokens(config, section, (side, side)) / picture_tokens(config, (side, side))[1]
    fixed = section.budget if section.enabled and isinstance(section.budget, int) else None
    tiled = is_tiled(config)

    @functools.lru_cache(maxsize=4096)
    def tokens_of_size(size: tuple[int, int]) -> int:
        _, patches, newlines = picture_tokens(config, size)
        return newlines + (round(share * patches) if fixed is None else min(fixed, patches))

    return lambda picture: tokens_of_size((tiled and picture.size()) or (side, side))


__all__ = ["Batch", "BatchPlan", "check_length", "plan_batches", "position_limit"]
