"""Published LLaVAs at full size: configs, Hub ids and licences.

No weights are included or downloaded: the configs serve the cost model, benchmarks with random weights, checks of key
layouts on the meta device, and model cards. The values are those of the config.json and of the model card of each
repository.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig

CLIP_VIT_L_336 = "openai/clip-vit-large-patch14-336"
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
"""Vision tower of CLIP ViT-L/14-336: 576 patches of width 1,024."""
TEXT_ENCODER = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published; transformers then pools at the largest id, which is the end-of-text token
    "pad_token_id": 1,
}
"""Text encoder of CLIP ViT-L/14-336, as OpenAI's repository configures it."""

_VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}
_VICUNA_13B = {
    **_VICUNA,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_MISTRAL = {
    **_VICUNA,
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
}
_LLAMA_3 = {
    **_VICUNA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "vocab_size": 128320,
}
_YI_34B = {
    **_VICUNA,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "rope_theta": 5e6,
    "vocab_size": 64064,
}


@dataclasses.dataclass(frozen=True)
class FullSize:
    """A published LLaVA.

    Args:
        name: The name that `reccomp-hf cost --config` accepts.
        base_model: Hub id of the stock checkpoint.
        license: Licence in the metadata of the stock checkpoint's model card.
        text: The language model's config.
        tiled: Whether it is a LLaVA-NeXT, which cuts images into tiles.
        image_token: Id of the image placeholder: the first one after the language model's own vocabulary.
        clip: Hub id of the CLIP that the vision tower was taken from.
    """

    name: str
    base_model: str
    license: str
    text: dict[str, Any]
    tiled: bool
    image_token: int = 32000
    clip: str = CLIP_VIT_L_336

    def config(
        self, preset: str = "paper", *, visual_only: bool = False, **fields: Any
    ) -> LlavaRecCompConfig | LlavaNextRecCompConfig:
        """The config of the compressed model: the preset's section with `fields` overridden, and CLIP's text encoder.

        Args:
            preset: Name of a preset, see [`TokenRecoveryConfig.from_preset`].
            visual_only: Leave out the text encoder.
            **fields: Fields of the `token_recovery` section.

        Raises:
            ValueError: A preset or field is unknown, or a value is not valid.
        """
        fields.setdefault("text_encoder_config", None if visual_only else dict(TEXT_ENCODER))
        config_class = LlavaNextRecCompConfig if self.tiled else LlavaRecCompConfig
        return config_class(
            vision_config=dict(VISION),
            text_config=dict(self.text),
            token_recovery=TokenRecoveryConfig.from_preset(preset, **fields),
            image_token_index=self.image_token,
            pad_token_id=self.image_token + 1,
            image_seq_length=576,
            tie_word_embeddings=False,
        )


FULL_SIZE: dict[str, FullSize] = {
    entry.name: entry
    for entry in (
        FullSize("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "llama2", _VICUNA, tiled=False),
        FullSize("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "llama2", _VICUNA_13B, tiled=False),
        FullSize("llava-v1.6-vicuna-7b", "llava-hf/llava-v1.6-vicuna-7b-hf", "llama2", _VICUNA, tiled=True),
        FullSize("llava-v1.6-vicuna-13b", "llava-hf/llava-v1.6-vicuna-13b-hf", "llama2", _VICUNA_13B, tiled=True),
        FullSize("llava-v1.6-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf", "apache-2.0", _MISTRAL, tiled=True),
        FullSize("llama3-llava-next-8b", "llava-hf/llama3-llava-next-8b-hf", "llama3", _LLAMA_3, True, 128256),
        FullSize("llava-v1.6-34b", "llava-hf/llava-v1.6-34b-hf", "apache-2.0", _YI_34B, True, 64000),
    )
}
"""Name -> published checkpoint."""


def full_size(name: str) -> FullSize:
    """The published checkpoint of that name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in FULL_SIZE:
        raise ValueError(f"Unknown configuration {name!r}; known ones are {', '.join(FULL_SIZE)}.")
    return FULL_SIZE[name]


__all__ = ["CLIP_VIT_L_336", "FULL_SIZE", "FullSize", "full_size"]
