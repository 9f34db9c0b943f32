"""vLLM's worker for CPUs, with the hook that sets positions after images are encoded."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class PlacesCPUWorker(CPUWorker):
    """The stock worker for a checkpoint with original positions."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model as the stock worker does."""
        super().load_model(**kwargs)
        # A private attribute of vLLM 0.32's runners, which `GPUModelRunner.load_model` sets from the config and
        # `CPUModelRunner.load_model` does not. Where it is not read, image tokens keep their two channels, and the
        # first image ends in an error.
        self.model_runner.is_multimodal_pruning_enabled = True


__all__ = ["PlacesCPUWorker"]
