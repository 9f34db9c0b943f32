"""Models with random weights, of published sizes or of a size that a CPU runs in minutes."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from ..published import FULL_SIZE, TEXT_ENCODER, VISION, full_size

MID = "mid"
CONFIGS = (MID, *FULL_SIZE)
"""Names that `--config` accepts."""
DYNAMIC_SHARE = 0.1
"""Share of the patches that a random model keeps in dynamic mode after `sharpen`: the paper's tenth."""
SHARPNESS = (1, 4, 16, 64, 256, 1024)

_MID_TEXT = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "vocab_size": 32064,
}
# Vision tower and text encoder are in proportion to the language model as in LLaVA-1.5-7B; the grid is CLIP's.
_MID_VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
_MID_ENCODER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
_MID_IMAGE_TOKEN = 32000


def named_config(name: str, preset: str) -> LlavaRecCompConfig | LlavaNextRecCompConfig:
    """The config of that name: `mid` (300 M parameters in the language model, 576 patches) or a published LLaVA's.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in CONFIGS:
        raise ValueError(f"Unknown configuration {name!r}; known ones are {', '.join(CONFIGS)}.")
    if name != MID:
        return full_size(name).config(preset)
    encoder = {**TEXT_ENCODER, **_MID_ENCODER, "projection_dim": 256}
    return LlavaRecCompConfig(
        vision_config={**VISION, **_MID_VISION, "projection_dim": 256},
        text_config=dict(_MID_TEXT),
        token_recovery=TokenRecoveryConfig.from_preset(preset, text_encoder_config=encoder),
        image_token_index=_MID_IMAGE_TOKEN,
        pad_token_id=_MID_IMAGE_TOKEN + 1,
        image_seq_length=576,
        tie_word_embeddings=False,
    )


def random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of that config with random weights, built where it will run, in eval mode."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    with device:  # a copy, because transformers writes the dtype into the config
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
    return model.to(device, dtype).eval()


@torch.no_grad()
def sharpen(model: Any, inputs: dict[str, Any], share: float = DYNAMIC_SHARE) -> float:
    """Scale the query that gives the saliency, so that the dynamic mode keeps about that share of the patches.

    With random weights the attention is almost uniform: no patch stands out, and nearly none is kept.

    Args:
        model: A model with random weights; its vision tower is changed.
        inputs: Inputs of the model, see `batches`.
        share: Share of the patches to keep, in (0, 1).

    Returns:
        The factor that the query was scaled by.
    """
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    projection = layers[model.config.token_recovery.visual_layer % len(layers)].self_attn.q_proj
    weight, distance = projection.weight.clone(), {}
    for factor in SHARPNESS:
        projection.weight.copy_(weight * factor)
        records = model.recover(**inputs, token_recovery={"method": "recoverable", "budget": None})
        kept = sum(int(record.counts.sum()) for record in records)
        distance[factor] = abs(kept / sum(record.cluster.numel() for record in records) - share)
    best = min(distance, key=lambda factor: distance[factor])
    projection.weight.copy_(weight * best)
    return float(best)


__all__ = ["CONFIGS", "DYNAMIC_SHARE", "MID", "named_config", "random_model", "sharpen"]
