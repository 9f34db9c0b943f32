"""True token counts of a checkpoint, by its own choice on drawn scenes; its language model is not loaded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, LlamaConfig

from ...core.modeling_llava import LlavaRecCompForConditionalGeneration
from ...core.modeling_llava_next import LlavaNextRecCompForConditionalGeneration
from ...core.text_encoder import RecoveryModulesMixin
from ...demo import EVALUATION_SEEDS, draw_scene, questions
from ..quiet import quiet

SCENES = 8
"""Drawn scenes that the counts are taken over, with a question about each; the kinds of questions take turns."""
NEEDED = ("vision_tower.", "token_recovery.")
MODELS = {
    model.config_class.model_type: model
    for model in (LlavaRecCompForConditionalGeneration, LlavaNextRecCompForConditionalGeneration)
}


@torch.no_grad()
def measure_tokens(folder: Path, scenes: int = SCENES) -> dict[str, float] | None:
    """How many tokens the checkpoint keeps, on average over the probe set.

    Args:
        folder: A checkpoint of ours.
        scenes: Drawn scenes.

    Returns:
        `"pictures"`, `"stock"` (patches), `"mean"`, `"least"`, `"most"`, and the means of `"visual"`,
        `"text"`, `"coverage"` and `"merged"` tokens, newlines apart; `None` where there is nothing to measure: no
        weights, no processor, or `enabled: false`.
    """
    weights = sorted(folder.glob("model*.safetensors"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not weights or not config.token_recovery.enabled or not (folder / "processor_config.json").is_file():
        return None
    with quiet():
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    found: list[dict[str, int]] = []
    with _vision_side(config, weights) as model:
        for index, seed in enumerate(EVALUATION_SEEDS[:scenes]):
            scene = draw_scene(seed)
            asked = questions(scene, seed)
            inputs = processor(
                images=[scene.image],
                text=f"{processor.image_token}\n{asked[index % len(asked)].text}",
                recovery_text=asked[index % len(asked)].text,
                return_tensors="pt",
            )
            found += [_count(record) for record in model.recover(**inputs)]
    totals = [entry["total"] for entry in found]
    means = {name: sum(entry[name] for entry in found) / len(found) for name in found[0]}
    return {
        "pictures": len(found),
        "mean": means.pop("total"),
        "least": min(totals),
        "most": max(totals),
        **means,
    }


def _count(record: Any) -> dict[str, int]:
    """Tokens of a picture by the stage that chose them."""
    return {"stock": record.saliency.numel(), "total": int(record.counts.sum()), **record.stage_counts()}


@contextlib.contextmanager
def _vision_side(config: Any, weights: list[Path]) -> Iterator[Any]:
    """The checkpoint's vision tower and text encoder in float32, with a language model of one tiny random layer."""
    config.text_config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=config.text_config.vocab_size,
        tie_word_embeddings=False,
    )
    tensors: dict[str, torch.Tensor] = {}
    for path in weights:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if any(part in key for part in NEEDED)]  # noqa: SIM118 it is no dict
            tensors |= {key: file.get_tensor(key) for key in keys}
    with tempfile.TemporaryDirectory(prefix="reccomp-hf-probe-") as temporary:
        config.save_pretrained(temporary)
        save_file(tensors, Path(temporary, "model.safetensors"), metadata={"format": "pt"})
        tensors.clear()
        # The stock method: ours refuses a checkpoint without its language model.
        load: Any = super(RecoveryModulesMixin, MODELS[config.model_type]).from_pretrained  # type: ignore[misc]
        with quiet():  # that the language model is missing is meant so
            model, info = load(temporary, dtype=torch.float32, output_loading_info=True)
        missing = sorted(key for key in info["missing_keys"] if any(part in key for part in NEEDED))
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of its vision side, {missing[0]} among them."
            )
        yield model.eval()


__all__ = ["measure_tokens"]
