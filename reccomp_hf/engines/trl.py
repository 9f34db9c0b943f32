"""Training under trainers that go around a model's `forward`."""

from __future__ import annotations

from typing import Any


class CompressedTrainerMixin:
    """Shortens every batch before a trainer computes its loss.

    It stands in front of the trainer: `class CompressedSFTTrainer(CompressedTrainerMixin, SFTTrainer): ...`.

    TRL's `SFTTrainer` (1.x) never calls `forward`: it takes the states of the model without its head and pairs them
    with the labels that the collator gave, so that the pictures would be read uncompressed and without a word. Given
    what `compress_inputs` returns it reads the kept tokens, and the labels are cut with them. Transformers' own
    `Trainer` calls `forward`, which compresses by itself, and needs none of this.

    Projected features are computed outside the wrapped model: distributed data parallel training works; for sharded
    weights (FSDP, DeepSpeed ZeRO-3) take transformers' `Trainer`.
    """

    accelerator: Any

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own method, on the shortened batch; `model` may be wrapped by PEFT and accelerate."""
        shortened, record = self.accelerator.unwrap_model(model).compress_inputs(**inputs)
        if record is not None:
            shortened.pop("input_ids")  # inputs_embeds take their place
        return super().compute_loss(model, shortened, *args, **kwargs)  # type: ignore[misc]


__all__ = ["CompressedTrainerMixin"]
