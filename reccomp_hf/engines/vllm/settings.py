"""vLLM's own settings for a checkpoint, checked and changed before an engine is built."""

from __future__ import annotations

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .checks import keeps_places, override
from .ranks import check_ranks

_ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary embeddings whose values at a position do not depend on the largest position."""
_CPU_WORKER = f"{__package__}.worker.PlacesCPUWorker"


class RecoverySettings(VerifyAndUpdateConfig):
    """vLLM calls these methods where it changes its settings for an architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Make vLLM keep three rows of positions, and ask the model for them once images are encoded."""
        multimodal = model_config.multimodal_config
        if multimodal is None or not keeps_places(model_config.hf_config):
            return
        if multimodal.get_limit_per_prompt("image") == 0:
            return  # text has consecutive positions
        # With M-RoPE, a config says how three rows share the channels; the model here reads the first row alone.
        model_config.hf_config.mrope_section = [1, 1, 1]
        multimodal.video_pruning_rate = 0.5  # any rate: it switches the hook on, and there are no videos

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the settings that the vision tower and positions depend on, and name a worker for CPUs.

        Raises:
            ValueError: Settings with which vLLM would divide the tower, or use other positions.
        """
        model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
        check_ranks(model_config, parallel.tensor_parallel_size)
        if not model_config.uses_mrope:
            return
        rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
        rope_type = rope.get("rope_type", "default")
        refused = {
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "speculative decoding": vllm_config.speculative_config is not None,
            f"rotary embeddings of the type {rope_type!r}": rope_type not in _ROPE_TYPES,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f'token_recovery.position_ids is "original", which does not work with {name} in vLLM. Serve '
                    f"without it, or with consecutive positions: {override(position_ids='compact')}."
                )
        if current_platform.is_cpu() and parallel.worker_cls == "auto":
            parallel.worker_cls = _CPU_WORKER


def position_count(config: ModelConfig) -> int:
    """Number of positions that requests can reach.

    A prompt has fewer than the model's config names (see `check_positions`), and its answer fewer than vLLM's longest
    sequence.
    """
    return config.hf_text_config.max_position_embeddings + config.max_model_len


__all__ = ["RecoverySettings", "position_count"]
