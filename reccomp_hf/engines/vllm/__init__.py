"""The plug-in for vLLM: compressed LLaVAs with a fixed budget, served with question-guided recovery.

vLLM finds [`register`] by the entry point `vllm.general_plugins` in every process of its own. A checkpoint is then
served by its folder or Hub id, without `--trust-remote-code`.
"""

from __future__ import annotations

ARCHITECTURES = ("LlavaRecCompForConditionalGeneration", "LlavaNextRecCompForConditionalGeneration")


def register() -> None:
    """Tell vLLM's registry the classes of our architectures, by name; a second call changes nothing.

    transformers' Auto classes know our configs and processors already: the package above has registered them.
    """
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")


__all__ = ["ARCHITECTURES", "register"]
