"""Training with the trainers of transformers and TRL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.inner_model import ASKING_TAG


class CompressedTrainerMixin:
    """Gives trainers what compression takes away: questions to GRPO and RLOO, cut labels to a loss of their own.

    The mixin comes before the trainer: `class CompressedGRPOTrainer(CompressedTrainerMixin, GRPOTrainer): ...`.

    - TRL's `GRPOTrainer` and `RLOOTrainer` pass on only fields that they know, so that the question which chooses the
      tokens is lost between sampling and scoring. The mixin reads it in the prompt's ids.
    - Transformers' `Trainer` keeps the labels where it computes the loss (`label_smoothing_factor`,
      `compute_loss_func`) or metrics (`compute_metrics`, `predict`). The mixin shortens the batch first, so that
      labels, inputs and logits have the same places. Smoothing compares each label with the logits of the place
      before it, which transformers leaves out for LLaVA.

    Training and evaluation by the model's own loss need no mixin, with `Trainer` or TRL's `SFTTrainer`, `DPOTrainer`
    and `KTOTrainer`.

    Written for TRL 1.16.
    """

    accelerator: Any
    args: Any
    compute_loss_func: Any
    label_smoother: Any
    processing_class: Any
    _tag_names: list[str]
    _prepare_inputs: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if tags := getattr(cls, "_tag_names", None):  # TRL tags the model with them
            cls._tag_names = list(dict.fromkeys([*tags, ASKING_TAG]))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own method, on the shortened batch where it computes the loss itself."""
        smooths = self.label_smoother is not None
        if smooths or self.compute_loss_func is not None:
            inputs = self._shortened(model, inputs)
            if smooths and self.compute_loss_func is None and "labels" in inputs:
                following = inputs["labels"].roll(-1, 1)
                following[:, -1] = -100
                inputs = {**inputs, "labels": following}
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own method, on the shortened batch; generated answers have the places of the uncut one."""
        generates = getattr(self.args, "predict_with_generate", False)
        if not prediction_loss_only and not generates and _holds_labels(inputs):
            with torch.no_grad():
                inputs = self._shortened(model, self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]

    def _shortened(self, model: Any, inputs: Any) -> Any:
        """A batch of images and labels after `compress_inputs`; any other as it is."""
        if not _holds_labels(inputs):
            return inputs
        unwrapped = self.accelerator.unwrap_model(model)
        compressing = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
        with self.accelerator.autocast():
            return compressing.compress_inputs(**inputs)[0]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own method, on a model that is given the questions."""
        questions = {}
        for name in ("recovery_input_ids", "recovery_attention_mask", "recovery_rule", "recovery_words"):
            kwargs.pop(name, None)  # of the processor; the trainer's method does not take them
        if kwargs.get("pixel_values") is not None:
            questions = self._questions(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        asking = _Asking(model, questions)
        return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
            asking, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _questions(self, prompt_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The processor's fields for the questions of prompts."""
        processor = self.processing_class
        rows = [ids[kept.bool()].tolist() for ids, kept in zip(prompt_ids, mask, strict=True)]
        prompts = [processor.tokenizer.decode(row, skip_special_tokens=False) for row in rows]
        fields = processor.encode_questions(processor.questions_of_prompts(prompts))
        return {name: value.to(prompt_ids.device) for name, value in fields.items()}


def _holds_labels(inputs: Any) -> bool:
    """Whether a batch holds images and labels."""
    return isinstance(inputs, Mapping) and {"pixel_values", "labels"} <= inputs.keys()


class _Asking:
    """A model that is called with one batch of rows after the other, and is given the questions of these rows."""

    def __init__(self, model: Any, questions: dict[str, Tensor]) -> None:
        self._model, self._questions, self._row = model, questions, 0

    def __call__(self, **inputs: Any) -> Any:
        start, self._row = self._row, self._row + len(inputs["input_ids"])
        rows = {name: value[start : self._row] for name, value in self._questions.items()}
        return self._model(**inputs, **rows)


__all__ = ["CompressedTrainerMixin"]
