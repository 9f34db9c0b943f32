"""Token counts of a checkpoint, measured on drawn scenes; its language model's layers are not loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ...demo import EVALUATION_SEEDS, draw_scene, questions
from ..image_encoder import load_image_encoder
from ..processors import load_processor
from ..quiet import quiet
from ..weight_files import WeightFiles

SCENES = 8
"""Number of drawn scenes, each with a question; the kinds of questions take turns."""


@torch.no_grad()
def measure_tokens(folder: Path, scenes: int = SCENES) -> dict[str, float] | None:
    """Average number of tokens that a checkpoint keeps of the probe scenes, in float32.

    Args:
        folder: A compressed checkpoint.
        scenes: Number of drawn scenes.

    Returns:
        `"pictures"`, `"stock"` (patches), `"mean"`, `"least"`, `"most"`, and the means of `"visual"`,
        `"text"`, `"coverage"` and `"merged"` tokens, newlines not counted; `None` if there is nothing to measure: no
        weights, no processor, or `enabled: false`.

    Raises:
        ValueError: The checkpoint lacks weights.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    has_files = bool(WeightFiles.find(folder).present) and (folder / "processor_config.json").is_file()
    if not has_files or not config.token_recovery.enabled:
        return None
    with quiet():
        processor = load_processor(folder)
    model = load_image_encoder(folder, dtype=torch.float32)
    counts: list[dict[str, int]] = []
    for index, seed in enumerate(EVALUATION_SEEDS[:scenes]):
        scene = draw_scene(seed)
        asked = questions(scene, seed)
        question = asked[index % len(asked)].text
        text = f"{processor.image_token}\n{question}"
        inputs = processor(images=[scene.image], text=text, recovery_text=question, return_tensors="pt")
        counts += [_count(record) for record in model.recover(**inputs)]
    totals = [count["total"] for count in counts]
    means = {name: sum(count[name] for count in counts) / len(counts) for name in counts[0]}
    return {
        "pictures": len(counts),
        "mean": means.pop("total"),
        "least": min(totals),
        "most": max(totals),
        **means,
    }


def _count(record: Any) -> dict[str, int]:
    """Tokens of an image, and by the stage that chose them."""
    return {"stock": record.saliency.numel(), "total": int(record.counts.sum()), **record.stage_counts()}


__all__ = ["measure_tokens"]
