"""From a request's prompt and pictures to what the engine schedules: placeholders, pixels, and the question.

The question is cut out of the prompt by our own processor and becomes one of the picture's processing arguments, so
that it is part of the picture's hash: vLLM's processor, encoder and prefix caches all go by that. A picture is one
thing under one question and another under the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, ImageSize, MultiModalDataItems
from vllm.multimodal.processing import ProcessorInputs, PromptReplacement, PromptUpdate, TimingContext

from ...core.configuration import TokenRecoveryConfig
from ...core.counting import picture_tokens
from ...core.methods.registry import get_method
from ...core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .checks import REQUEST_KEYS, check_servable, count_tokens, override, request_budget

QUESTIONS, BUDGET = "recovery_text", "recovery_budget"
"""What `RecoveryProcessorMixin.apply` leaves among a request's processing arguments."""
QUESTION_FIELDS = ("recovery_input_ids", "recovery_attention_mask")


class RecoveryInfoMixin:
    """What vLLM asks about a model before it has one."""

    ctx: Any
    processor_class: type

    @property
    def config(self) -> Any:
        """The checkpoint's config."""
        return self.ctx.model_config.hf_config

    @property
    def section(self) -> TokenRecoveryConfig:
        """The settings, `--hf-overrides` included."""
        return self.config.token_recovery

    @property
    def reads_question(self) -> bool:
        """Whether a question changes what a picture becomes."""
        section = self.section
        has_text = section.enabled and section.text_encoder_config is not None
        return has_text and get_method(section.method).reads_question(section)

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Our processor, without the arguments of a request that are for `RecoveryProcessorMixin`."""
        return self.ctx.get_hf_processor(self.processor_class, **_not_ours(kwargs))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens of a picture under the checkpoint's budget; placeholders, profiling and caches go by it."""
        return count_tokens(self.config, 0, (image_width, image_height))

    def get_image_size_with_most_features(self) -> ImageSize:
        """The picture that costs the vision tower most, however few tokens it becomes."""
        pinpoints = getattr(self.config, "image_grid_pinpoints", None)
        if pinpoints is None:
            return super().get_image_size_with_most_features()  # type: ignore[misc]
        height, width = max(pinpoints, key=lambda size: picture_tokens(self.config, (size[1], size[0]))[:2])
        return ImageSize(width=width, height=height)


class LlavaRecCompInfo(RecoveryInfoMixin, LlavaProcessingInfo):
    """Of LLaVA-1.5."""

    processor_class = LlavaRecCompProcessor


class LlavaNextRecCompInfo(RecoveryInfoMixin, LlavaNextProcessingInfo):
    """Of LLaVA-NeXT."""

    processor_class = LlavaNextRecCompProcessor


class RecoveryDummyInputsBuilder(LlavaDummyInputsBuilder[Any]):
    """Pictures for profiling, with a question about them."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """The pictures' placeholders and a question."""
        return super().get_dummy_text(mm_counts) + "What is this?"


class RecoveryProcessorMixin:
    """The question and the budget of a request on their way to the model."""

    info: Any

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint that cannot be served, in the front end, before the engine starts.

        Not earlier: where an info's `__init__` raises ValueError, vLLM goes on without pictures.

        Raises:
            ValueError: It cannot be served, see `check_servable`, its processor cannot read a question, or
                `--mm-processor-kwargs` hold what is ours.
        """
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]
        multimodal = info.ctx.get_mm_config()
        pictures = multimodal.get_limit_per_prompt("image") > 0
        check_servable(info.config, pictures=pictures, embeds=multimodal.enable_mm_embeds)
        if info.reads_question and info.get_hf_processor().recovery_tokenizer is None:
            raise ValueError(
                f"The processor of {info.model_id} has no recovery_tokenizer, without which the text encoder cannot "
                "read the question: save the processor that belongs to the model beside it (save_pretrained), or "
                f"serve by the picture alone: {override(text_share=0.0)}."
            )
        if ours := [key for key in REQUEST_KEYS if key in (multimodal.mm_processor_kwargs or {})]:
            raise ValueError(
                f"--mm-processor-kwargs hold {ours[0]!r}, which is a request's own. For all requests, start the "
                f"server with {override()}."
            )

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """As the stock method, with question and budget among the arguments that the hash is made of."""
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=self._arguments(inputs))
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _arguments(self, inputs: ProcessorInputs) -> dict[str, object]:
        """A request's arguments with those that are ours read: equal pictures under equal ones are equal.

        Raises:
            ValueError: A picture without a question, or a `token_recovery` that is no budget.
        """
        given, items = inputs.hf_processor_mm_kwargs, inputs.mm_data_items.get("image")
        arguments = _not_ours(given)
        if not items or isinstance(items, ImageEmbeddingItems):
            if given.get("token_recovery") is not None:
                raise ValueError("image_embeds are compressed already: leave token_recovery out of the request.")
            return arguments
        if budget := request_budget(self.info.section, given.get("token_recovery")):
            arguments[BUDGET] = budget
        if self.info.reads_question:
            prompt = self.info.get_tokenizer().decode(inputs.prompt, skip_special_tokens=False)
            text, turns = given.get("recovery_text"), given.get("recovery_turns")
            processor = self.info.get_hf_processor()
            (arguments[QUESTIONS],) = processor.questions_of_prompts([prompt], None if text is None else [text], turns)
        return arguments

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Our processor on the pictures, and per picture the question as CLIP's tokens and the budget."""
        processed = super()._call_hf_processor(hf_data, _not_ours(hf_kwargs))  # type: ignore[misc]
        pictures = len(processed["pixel_values"])
        processed[BUDGET] = torch.full((pictures,), float(hf_kwargs.get(BUDGET, 0)), dtype=torch.float64)  # type: ignore[arg-type]
        if QUESTIONS in hf_kwargs:
            question = self.info.get_hf_processor().encode_questions([hf_kwargs[QUESTIONS]])
            for name in QUESTION_FIELDS:
                processed[name] = question[name].expand(pictures, -1, -1)
        return processed

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str | None:
        """No text: our processor would look for a question in it."""
        return None

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """One of each field per picture."""
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        ours = dict.fromkeys(QUESTION_FIELDS, MultiModalFieldConfig.batched("image"))
        return {**fields, **ours, BUDGET: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """As many placeholders as a picture has tokens under the request's budget."""
        config, budget = self.info.config, float(hf_processor_mm_kwargs.get(BUDGET, 0))  # type: ignore[arg-type]

        def replacement(index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):
                return [config.image_token_id] * images.get_feature_size(index)
            size = images.get_image_size(index)
            return [config.image_token_id] * count_tokens(config, budget, (size.width, size.height))

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=replacement)]


class LlavaRecCompMultiModalProcessor(RecoveryProcessorMixin, LlavaMultiModalProcessor):
    """Of LLaVA-1.5."""


class LlavaNextRecCompMultiModalProcessor(RecoveryProcessorMixin, LlavaNextMultiModalProcessor):
    """Of LLaVA-NeXT."""


def _not_ours(arguments: Mapping[str, object]) -> dict[str, object]:
    """Processing arguments without those that are ours."""
    return {key: value for key, value in arguments.items() if key not in (*REQUEST_KEYS, BUDGET)}


__all__ = [
    "LlavaNextRecCompInfo",
    "LlavaNextRecCompMultiModalProcessor",
    "LlavaRecCompInfo",
    "LlavaRecCompMultiModalProcessor",
    "RecoveryDummyInputsBuilder",
]
