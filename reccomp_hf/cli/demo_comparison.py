"""The comparison of `reccomp-hf demo`: answers of a small trained model, with compression and without."""

from __future__ import annotations

from typing import Any

import torch

from ..core.features import TokenRecoveryOutput
from ..measure.plot import plot_recovery
from .image_questions import ImageQuestions, answers_to, encoded_questions

_MAX_NEW_TOKENS = 8  # the demo model's answers are one word


@torch.no_grad()
def compare(model: Any, processor: Any, picture: ImageQuestions) -> tuple[dict[str, Any], list[TokenRecoveryOutput]]:
    """Ask every question with compression and without.

    Returns:
        Plain values, see the keys, and the record of the image for each question.
    """
    inputs = encoded_questions(model, processor, picture)
    answers = [
        answers_to(model, processor, inputs, override, _MAX_NEW_TOKENS)[0] for override in ({}, {"enabled": False})
    ]
    records = model.recover(**inputs)
    rows = zip(picture.questions, picture.expected, *answers, map(_count, records), strict=True)
    facts = {
        "picture": picture.source,
        "seed": picture.seed,
        "budget": model.config.token_recovery.budget,
        "answers": [
            {"question": question, "expected": expected, "compressed": short, "uncompressed": full, "tokens": tokens}
            for question, expected, short, full, tokens in rows
        ],
    }
    return facts, records


def draw(
    facts: dict[str, Any], picture: ImageQuestions, records: list[TokenRecoveryOutput], processor: Any, path: str
) -> None:
    """Write the image under each question, with marks, to a file."""
    answers = [
        f"{answer['compressed'] or 'nothing'} (reading all: {answer['uncompressed'] or 'nothing'})"
        for answer in facts["answers"]
    ]
    figure = plot_recovery(
        picture.image,
        records,
        processor=processor,
        questions=picture.questions,
        answers=answers,
        method=facts["method"],
        title=f"{facts['model']}, preset {facts['preset']}",
    )
    figure.savefig(path)


def _count(record: TokenRecoveryOutput) -> dict[str, Any]:
    """Numbers of tokens that stand for the image, by stage."""
    patches, total = record.cluster.numel(), int(record.counts.sum())
    return {**record.stage_counts(), "total": total, "of": patches, "share": round(total / patches, 4)}


__all__ = ["compare", "draw"]
