"""Training with TRL."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class CompressedTrainerMixin:
    """Scores answers of GRPO and RLOO on the image tokens that they were sampled from.

    The mixin comes before the trainer: `class CompressedGRPOTrainer(CompressedTrainerMixin, GRPOTrainer): ...`.

    These trainers pass on only fields that they know, so that the question which chooses the tokens is lost between
    sampling and scoring. The mixin reads it in the prompt's ids. TRL's `SFTTrainer`, `DPOTrainer` and `KTOTrainer`,
    and transformers' `Trainer`, need no mixin.

    Written for TRL 1.16.
    """

    processing_class: Any

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own method, on a model that is given the questions."""
        questions = {}
        for name in ("recovery_input_ids", "recovery_attention_mask", "recovery_rule"):
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


class _Asking:
    """A model that is called with one batch of rows after the other, and is given the questions of these rows."""

    def __init__(self, model: Any, questions: dict[str, Tensor]) -> None:
        self._model, self._questions, self._row = model, questions, 0

    def __call__(self, **inputs: Any) -> Any:
        start, self._row = self._row, self._row + len(inputs["input_ids"])
        rows = {name: value[start : self._row] for name, value in self._questions.items()}
        return self._model(**inputs, **rows)


__all__ = ["CompressedTrainerMixin"]
