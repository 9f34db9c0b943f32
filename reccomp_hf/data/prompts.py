"""Prompts as an evaluation, a prediction and lmms-eval send them to a model, and the visual tokens that were read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from PIL import Image


def build_prompt(processor: Any, text: str, images: int) -> str:
    """Write a user turn as the chat template does, or as LLaVA-1.5 does where there is no template.

    Args:
        processor: The processor of a compressed LLaVA.
        text: The text of the turn.
        images: Number of image placeholders in front of the text.

    Raises:
        ValueError: The chat template is damaged, or refuses such a turn.
    """
    if processor.chat_template is None:
        placeholders = f"{processor.image_token}\n" * images
        return f"USER: {placeholders}{text} ASSISTANT:"
    turn = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    try:
        return str(processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(
            f"The chat template cannot write a question with {images} images "
            f"({type(error).__name__}: {' '.join(str(error).split())}): correct chat_template.jinja of the checkpoint."
        ) from error


def add_instruction(question: str, instruction: str) -> str:
    """Append an answer instruction to a question, on a line of its own; an empty one changes nothing."""
    return f"{question}\n{instruction}" if instruction else question


def encode_rows(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    questions: Sequence[str | Sequence[str]],
    recovery_rules: Sequence[Any] | None = None,
) -> Any:
    """Encode rows of one user turn and one or more images each, padded on the left.

    Args:
        processor: The processor of a compressed LLaVA.
        images: The images of every row.
        texts: The text of every row's turn, which the language model reads.
        questions: The question of every row, which CLIP reads.
        recovery_rules: Rules of the settings, `None` for those of the processor.

    Returns:
        The processor's `BatchFeature` with PyTorch tensors.
    """
    return processor(
        images=[image for row in images for image in row],
        text=[build_prompt(processor, text, len(row)) for text, row in zip(texts, images, strict=True)],
        recovery_text=questions,
        recovery_rules=recovery_rules,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def count_visual_tokens(output: Any, images: Sequence[int], placeholders: list[int]) -> list[int]:
    """Visual tokens that the language model read in every row, LLaVA-NeXT's newlines included.

    Args:
        output: The output of `generate` with `return_dict_in_generate`.
        images: Number of images in every row.
        placeholders: Number of placeholders in every row, which is what is read where nothing was compressed.
    """
    if output.visual_token_counts is None:
        return placeholders
    counts = (output.visual_token_counts + output.newline_counts).cpu()
    return [int(row.sum()) for row in counts.split(list(images))]


__all__ = ["add_instruction", "build_prompt", "count_visual_tokens", "encode_rows"]
