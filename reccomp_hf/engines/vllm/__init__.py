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

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")


__all__ = ["ARCHITECTURES", "register"]
