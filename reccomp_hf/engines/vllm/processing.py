"""Processing of a request: placeholders, pixel values, and the question about its images.

Our own processor extracts the question from the prompt. The question becomes one of the image's processing arguments
and thereby part of the image's hash, which vLLM's processor, encoder and prefix caches use as their key: an image has
other tokens under another question.
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
from ...core.methods.registry import reads_question
from ...core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .budgets import (
    Budget,
    budget_to_tensor,
    count_tokens,
    longest_question,
    question_budget,
    request_budget,
)
from .checks import REQUEST_KEYS, check_request, check_servable, keeps_places, override

QUESTIONS, BUDGET = "recovery_text", "recovery_budget"
"""Processing arguments that `RecoveryProcessorMixin.apply` adds to a request."""
PLACEHOLDERS = "recovery_placeholders"
"""Field of an image: its number of placeholders in the uncompressed prompt, newlines included."""
QUESTION_FIELDS = ("recovery_input_ids", "recovery_attention_mask", "recovery_words")


class RecoveryInfoMixin:
    """The facts about a model that vLLM needs before it builds one."""

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
        """Whether the tokens of an image depend on the question."""
        section = self.section
        return section.enabled and section.text_encoder_config is not None and reads_question(section)

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Our processor, without the arguments of a request that `RecoveryProcessorMixin` handles."""
        return self.ctx.get_hf_processor(self.processor_class, **_stock_arguments(kwargs))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Most tokens of an image under the checkpoint's budgets, for profiling and caches."""
        size = (image_width, image_height)
        most = longest_question(self.config, size)
        return count_tokens(self.config, question_budget(self.section, [most]), size)

    @property
    def position_limit(self) -> int:
        """Number of positions of the language model."""
        return self.ctx.model_config.hf_text_config.max_position_embeddings

    def placeholders(self, width: int, height: int) -> int:
        """Placeholders of an image in the uncompressed prompt, newlines included."""
        _, patches, newlines = picture_tokens(self.config, (width, height))
        return patches + newlines

    def get_image_size_with_most_features(self) -> ImageSize:
        """The image size with the most tiles, and then the most patches, however few tokens it becomes."""
        pinpoints = getattr(self.config, "image_grid_pinpoints", None)
        if pinpoints is None:
            return super().get_image_size_with_most_features()  # type: ignore[misc]
        height, width = max(pinpoints, key=lambda size: picture_tokens(self.config, (size[1], size[0]))[:2])
        return ImageSize(width=width, height=height)


class LlavaRecCompInfo(RecoveryInfoMixin, LlavaProcessingInfo):
    """Processing info of LLaVA-1.5."""

    processor_class = LlavaRecCompProcessor


class LlavaNextRecCompInfo(RecoveryInfoMixin, LlavaNextProcessingInfo):
    """Processing info of LLaVA-NeXT."""

    processor_class = LlavaNextRecCompProcessor


class RecoveryDummyInputsBuilder(LlavaDummyInputsBuilder[Any]):
    """Images for profiling, with a question about them."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """The placeholders of the images and a question."""
        size = self.info.get_image_size_with_most_features()
        return super().get_dummy_text(mm_counts) + longest_question(self.info.config, (size.width, size.height))


class RecoveryProcessorMixin:
    """Passes the question and the budget or rule of a request to the model."""

    info: Any

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint that cannot be served, in the front end, before the engine starts.

        This cannot happen earlier: if the `__init__` of an info raises ValueError, vLLM continues without images.

        Raises:
            ValueError: The checkpoint cannot be served, see `check_servable`, its processor cannot read a question,
                or `--mm-processor-kwargs` contain an argument that belongs to a request.
        """
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]
        multimodal = info.ctx.get_mm_config()
        pictures = multimodal.get_limit_per_prompt("image") > 0
        check_servable(info.config, pictures=pictures, embeds=multimodal.enable_mm_embeds)
        if info.reads_question and info.get_hf_processor().recovery_tokenizer is None:
            raise ValueError(
                f"The processor of {info.model_id} has no recovery_tokenizer, without which the text encoder cannot "
                "read the question: save the processor that belongs to the model in its folder (save_pretrained), or "
                f"serve without the question: {override(text_share=0.0)}."
            )
        if misplaced := [key for key in REQUEST_KEYS if key in (multimodal.mm_processor_kwargs or {})]:
            raise ValueError(
                f"--mm-processor-kwargs contain {misplaced[0]!r}, which only a request may set. For all requests, "
                f"start the server with {override()}."
            )

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """Run the stock method with question and budget among the arguments that enter the hash."""
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=self._arguments(inputs))
        images = inputs.mm_data_items.get("image")
        # Before the stock method: vLLM's front end notes an image there as sent to the engine.
        if images and keeps_places(self.info.config):
            self._check_positions(inputs.prompt, images)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _check_positions(self, prompt: Sequence[int], images: Any) -> None:
        """Check that a prompt at its original positions leaves one for an answer.

        Raises:
            ValueError: It does not.
        """
        sizes = [images.get_image_size(index) for index in range(len(images))]
        text = len(prompt) - list(prompt).count(self.info.config.image_token_id)
        positions = text + sum(self.info.placeholders(size.width, size.height) for size in sizes)
        if positions >= (limit := self.info.position_limit):
            raise ValueError(
                f"With original positions the prompt takes {positions} of the language model's {limit} positions, as "
                "without compression, and leaves none for an answer: shorten it, or serve with consecutive positions, "
                f"{override(position_ids='compact')}."
            )

    def _arguments(self, inputs: ProcessorInputs) -> dict[str, object]:
        """A request's arguments, in which question and budget replace those of `REQUEST_KEYS`.

        Raises:
            ValueError: An image without a question, a `token_recovery` that is not a valid budget, an argument that a
                request may not set, or embeddings that are not finite.
        """
        given, items = inputs.hf_processor_mm_kwargs, inputs.mm_data_items.get("image")
        context = self.info.ctx
        check_request(given, context.get_mm_config().mm_processor_kwargs or {}, context.model_config.max_model_len)
        arguments = _stock_arguments(given)
        if not items or isinstance(items, ImageEmbeddingItems):
            if given.get("token_recovery") is not None:
                raise ValueError("image_embeds are compressed already: leave token_recovery out of the request.")
            for index in range(len(items or [])):
                embeds = torch.as_tensor(items.get(index))
                if not embeds.is_floating_point() or not embeds.numel():
                    raise ValueError(
                        f"image_embeds of image {index} must be floats (tokens, channels) of at least one token, got "
                        f"{tuple(embeds.shape)} of {embeds.dtype}: embed it again (reccomp-hf embed)."
                    )
                if not embeds.isfinite().all():
                    raise ValueError(f"image_embeds of image {index} hold NaN or infinity: embed it again.")
            return arguments
        section, own = self.info.section, given.get("token_recovery")
        budget = request_budget(section, own)
        by_rule = bool(section.rules) and own is None
        if self.info.reads_question or by_rule:
            prompt = self.info.get_tokenizer().decode(inputs.prompt, skip_special_tokens=False)
            text, turns = given.get("recovery_text"), given.get("recovery_turns")
            processor = self.info.get_hf_processor()
            (questions,) = processor.questions_of_prompts([prompt], None if text is None else [text], turns)
            budget = question_budget(section, questions) if by_rule else budget
            if self.info.reads_question:
                arguments[QUESTIONS] = questions
        if budget is not None:
            arguments[BUDGET] = budget
        return arguments

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """The stock fields of the images, and for each image the question and the budget."""
        processed = super()._call_hf_processor(hf_data, _stock_arguments(hf_kwargs))  # type: ignore[misc]
        images = len(processed["pixel_values"])
        processed[BUDGET] = budget_to_tensor(_budget(hf_kwargs)).expand(images, -1)
        sizes = processed.get("image_sizes", [(1, 1)] * images)  # height and width; LLaVA-1.5 has one size
        processed[PLACEHOLDERS] = torch.tensor([self.info.placeholders(int(w), int(h)) for h, w in sizes])
        if QUESTIONS in hf_kwargs:
            question = self.info.get_hf_processor().encode_questions([hf_kwargs[QUESTIONS]])
            for name in QUESTION_FIELDS:
                processed[name] = question[name].expand(images, *question[name].shape[1:])
        return processed

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str | None:
        """Return no text: our processor would look for a question in it."""
        return None

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """Declare one entry of each field per image."""
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        questions = dict.fromkeys(QUESTION_FIELDS, MultiModalFieldConfig.batched("image"))
        on_host = dict.fromkeys((BUDGET, PLACEHOLDERS), MultiModalFieldConfig.batched("image", keep_on_cpu=True))
        return {**fields, **questions, **on_host}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """One placeholder for each token of an image under the request's budget."""
        config, budget = self.info.config, _budget(hf_processor_mm_kwargs)

        def replacement(index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):
                return [config.image_token_id] * images.get_feature_size(index)
            size = images.get_image_size(index)
            return [config.image_token_id] * count_tokens(config, budget, (size.width, size.height))

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=replacement)]


class LlavaRecCompMultiModalProcessor(RecoveryProcessorMixin, LlavaMultiModalProcessor):
    """Processor of LLaVA-1.5."""


class LlavaNextRecCompMultiModalProcessor(RecoveryProcessorMixin, LlavaNextMultiModalProcessor):
    """Processor of LLaVA-NeXT."""


def _budget(arguments: Mapping[str, Any]) -> Budget:
    """The budget among processing arguments."""
    return arguments.get(BUDGET)


def _stock_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Processing arguments without those that this plug-in handles."""
    return {key: value for key, value in arguments.items() if key not in (*REQUEST_KEYS, BUDGET)}


__all__ = [
    "LlavaNextRecCompInfo",
    "LlavaNextRecCompMultiModalProcessor",
    "LlavaRecCompInfo",
    "LlavaRecCompMultiModalProcessor",
    "RecoveryDummyInputsBuilder",
]
