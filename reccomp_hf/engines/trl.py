"""Training with trainers that bypass a model's `forward`."""

from __future__ import annotations

from typing import Any


class CompressedTrainerMixin:
    """Compresses every batch before a trainer computes its loss.

    The mixin comes before the trainer: `class CompressedSFTTrainer(CompressedTrainerMixin, SFTTrainer): ...`.

    TRL's `SFTTrainer` (1.x) never calls `forward`: it pairs the hidden states of the model without its head with the
    collator's labels, so that images would silently be read uncompressed. With the output of `compress_inputs` it
    reads the kept tokens, and the labels are cut with them. Transformers' own `Trainer` calls `forward`, which
    compresses by itself, and does not need the mixin.

    Projected features are computed outside the wrapped model: distributed data parallel training works; for sharded
    weights (FSDP, DeepSpeed ZeRO-3) use transformers' `Trainer`.
    """

    accelerator: Any

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call the trainer's own method on the compressed batch; `model` may be wrapped by PEFT and accelerate."""
        shortened, record = self.accelerator.unwrap_model(model).compress_inputs(**inputs)
        if record is not None:
            shortened.pop("input_ids")  # inputs_embeds take their place
        return super().compute_loss(model, shortened, *args, **kwargs)  # type: ignore[misc]


__all__ = ["CompressedTrainerMixin"]
