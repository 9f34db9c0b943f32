"""The comparison of `reccomp-hf demo`: answers of a small trained model, with compression and without."""

from __future__ import annotations

from typing import Any

import torch

from ..core.features import TokenRecoveryOutput
from ..measure.plot import plot_recovery
from .image_questions import ImageQuestions

_MAX_NEW_TOKENS = 8  # the demo model's answers are one word


@torch.no_grad()
def compare(model: Any, processor: Any, picture: ImageQuestions) -> tuple[dict[str, Any], list[TokenRecoveryOutput]]:
    """Ask every question with compression and without.

    Returns:
        Plain values, see the keys, and the record of the image for each question.
    """
    turns = [[{"type": "image"}, {"type": "text", "text": text}] for text in picture.questions]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        for turn in turns
    ]
    inputs = processor(
        images=[picture.image] * len(prompts), text=prompts, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device, model.dtype)
    answers = []
    for override in ({}, {"enabled": False}):
        options = {"max_new_tokens": _MAX_NEW_TOKENS, "do_sample": False, "token_recovery": override}
        ids = model.generate(**inputs, **options)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append([reply.strip() for reply in replies])
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
