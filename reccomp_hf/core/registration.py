"""Making transformers' Auto classes know our model types; nothing of transformers is changed."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .compat import auto_class
from .configuration import LlavaNextRecCompConfig, LlavaRecCompConfig
from .modeling_llava import LlavaRecCompForConditionalGeneration, LlavaRecCompModel
from .modeling_llava_next import LlavaNextRecCompForConditionalGeneration, LlavaNextRecCompModel
from .processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .remote_code import HEAD_CLASSES

MODELS: tuple[tuple[type, type, type, type], ...] = (
    (LlavaRecCompConfig, LlavaRecCompForConditionalGeneration, LlavaRecCompModel, LlavaRecCompProcessor),
    (
        LlavaNextRecCompConfig,
        LlavaNextRecCompForConditionalGeneration,
        LlavaNextRecCompModel,
        LlavaNextRecCompProcessor,
    ),
)


def register() -> None:
    """Register configs, models and processors; a second call does nothing.

    Raises:
        ValueError: The model type is taken by another class.
    """
    for config, head_model, base_model, processor in MODELS:
        model_type = config.model_type  # type: ignore[attr-defined]
        if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] is config:
            continue
        AutoConfig.register(model_type, config)  # raises where the model type is taken
        AutoModel.register(config, base_model, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
        for auto in filter(None, map(auto_class, HEAD_CLASSES)):
            auto.register(config, head_model, exist_ok=True)


__all__ = ["register"]
