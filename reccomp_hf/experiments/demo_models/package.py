"""Writes a trained CLIP and LLaVA as folders that transformers and `convert` read."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, LlavaForConditionalGeneration, LlavaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...checkpoints.cards import render_card
from ...checkpoints.convert import convert
from ..shipped_cards import demo_facts
from .config import TrainingConfig
from .tokenizers import CHAT_TEMPLATE, IMAGE_TOKEN, save_clip_tokenizer, save_llama_tokenizer

PRESET, BUDGET = "balanced", 16  # of 144 tokens

_BICUBIC = 3  # Pillow's number


def save_stock(
    clip: CLIPModel, llava: LlavaForConditionalGeneration, config: TrainingConfig, folder: Path
) -> tuple[Path, Path]:
    """Write both models in float16 with their image processors and tokenizers.

    Returns:
        The folders `llava` and `clip` inside `folder`.
    """
    llava_folder, clip_folder = folder / "llava", folder / "clip"
    for model, path in ((llava, llava_folder), (clip, clip_folder)):
        copy.deepcopy(model).to("cpu", torch.float16).save_pretrained(path)
        _save_image_processor(config, path)
    save_clip_tokenizer(clip_folder)
    save_llama_tokenizer(llava_folder)
    processor = LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(llava_folder),
        tokenizer=AutoTokenizer.from_pretrained(llava_folder),
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(llava_folder)
    return llava_folder, clip_folder


def _save_image_processor(config: TrainingConfig, folder: Path) -> None:
    """Write a configuration that `CLIPImageProcessor` of every release reads."""
    fields: dict[str, Any] = {
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": OPENAI_CLIP_STD,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": config.image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def ship(llava: Path, clip: Path, final: Path, facts: dict[str, Any]) -> None:
    """Convert both folders into the shipped checkpoint: with facts and card, without copies of this package's code.

    Args:
        llava: The stock LLaVA.
        clip: The CLIP of its vision tower.
        final: Folder to write; the result of an earlier call is replaced.
        facts: Content of `training.json`.
    """
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".shipping-") as work:
        staging = convert(llava, clip, Path(work, "checkpoint"), PRESET, budget=BUDGET)
        for code in staging.glob("*.py"):
            code.unlink()
        for file in staging.glob("*.json"):
            text = file.read_text(encoding="utf-8")
            if "auto_map" in text:
                fields = json.loads(text, object_hook=_without_code)
                file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (staging / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(render_card(demo_facts(staging)), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)


def _without_code(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "auto_map"}


__all__ = ["save_stock", "ship"]
