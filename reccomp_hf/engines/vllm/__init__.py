"""The plug-in for vLLM: serves compressed LLaVAs with a fixed budget and question-guided recovery.

vLLM finds [`register`] through the entry point `vllm.general_plugins` in each of its processes. A checkpoint is then
served by its folder or Hub id, without `--trust-remote-code`.
"""

from __future__ import annotations

ARCHITECTURES = ("LlavaRecCompForConditionalGeneration", "LlavaNextRecCompForConditionalGeneration")


def register() -> None:
    """Register the classes of our architectures with vLLM, by name; a second call changes nothing.

    transformers' Auto classes know our configs and processors already: importing `reccomp_hf` registers them.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .settings import RecoverySettings

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = RecoverySettings


__all__ = ["ARCHITECTURES", "register"]
