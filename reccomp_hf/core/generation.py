"""Generation on a shortened prompt that behaves like generation on the prompt as it was passed."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .checks import (
    cache_length,
    check_continuation,
    check_encoder_outputs,
    check_reads_embeddings,
    is_continuation,
    note_empty_answers,
)
from .compat import behind_cache, cache_of, default_max_length, extended_positions, is_prefill, stock_cache
from .configuration import TokenRecoveryConfig
from .front import QuestionIds
from .inner_model import InnerModelMixin
from .modeling import RecCompMixin
from .splicing import counted_positions
from .vision import check_pixels


class RecCompGenerationMixin(InnerModelMixin, RecCompMixin):
    """Token recovery for a stock LLaVA class that generates."""

    generation_config: Any

    def __init__(self, config: Any) -> None:
        """Build the model; the inner one, without the head, compresses calls that do not come through `forward`."""
        super().__init__(config)
        self._watch_inner_model()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        image_sizes: Tensor | None = None,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        past_key_values: Any = None,
        recovery_rule: Tensor | None = None,
        recovery_words: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: Any = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock method; with images, loss and logits are those of the shortened sequence.

        Args:
            input_ids: (R, L) int64; not read if `inputs_embeds` are given without images.
            pixel_values: Images of all rows in reading order, as the processor returns them.
            attention_mask: (R, L), 0 for padding.
            position_ids: (R, L) int64.
            cache: As in the stock method of transformers 5.24; empty if there are images.
            inputs_embeds: As in the stock method.
            image_sizes: (I, 2) height and width in pixels of every image; LLaVA-NeXT only.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            token_recovery: Fields of the config section to override for this call.
            past_key_values: The older name of `cache`; every version accepts both, and 5.24 warns of this one.
            recovery_rule: (R,) int64, the rule of each row as the processor writes it, -1 for none; read with `rules`.
            recovery_words: (R, M) int64, the questions' words as LLaVA's tokens, -1 for padding; read by `mmtok`.
            labels: (R, L) int64 for the uncut sequence; cut along with it.
            logits_to_keep: Number of last logits, 0 for all; indices only without images. The last logits are those
                of the last tokens as they were passed. All logits are those of the shortened sequence; without labels
                its last columns, too, are those that were passed.
            mm_encoder_outputs: As in the stock method of transformers 5, for the uncompressed model only.
            vision_feature_layer: As in the stock method; one layer below the last if images are compressed.
            vision_feature_select_strategy: As in the stock method; `"default"` if images are compressed.
            **kwargs: Everything else that the stock method takes.

        Returns:
            The stock output, with the images' projected tokens as `image_hidden_states` and their counts.

        Raises:
            ValueError: Inputs that do not fit, see [`RecCompMixin.compress_inputs`].
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs |= {"cache": cache, "past_key_values": past_key_values, "labels": labels}
        inputs |= {"logits_to_keep": logits_to_keep, "mm_encoder_outputs": mm_encoder_outputs, **kwargs}
        inputs |= {"vision_feature_layer": vision_feature_layer}
        inputs |= {"vision_feature_select_strategy": vision_feature_select_strategy}
        question = QuestionIds(recovery_input_ids, recovery_attention_mask, recovery_rule, recovery_words)
        return self._compressed_forward(inputs, question, token_recovery)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        token_recovery: Mapping[str, Any] | None = None,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        recovery_rule: Tensor | None = None,
        recovery_words: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock method; images are compressed once, before the prefill.

        Callbacks (`stopping_criteria`, `logits_processor`, `prefix_allowed_tokens_fn`, `streamer`) and the processors
        that transformers builds itself read the prompt as it was passed.

        With a non-empty `cache` (or `past_key_values`) of P entries the prompt is the new part alone if
        `attention_mask` is (R, P + L), with 0 for padding in the cache. `position_ids` (R, L) then continue those of
        the attended tokens unless they are given, as they must be with positions `"original"`; `inputs_embeds`
        (R, L, D) may be given along with the ids, as `compress_inputs` returns them. With a mask of (R, L), or without
        one, the prompt is the whole sequence, as in the stock method, and holds no image.

        Args:
            inputs: (R, L) prompt ids, as `input_ids`.
            generation_config: As in the stock method; `max_length` counts the prompt as it was passed.
            token_recovery: Fields of the config section to override for this call.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            recovery_rule: (R,) int64, the rule of each row as the processor writes it, -1 for none; read with `rules`.
            recovery_words: (R, M) int64, the questions' words as LLaVA's tokens, -1 for padding; read by `mmtok`.
            streamer: As in the stock method; it receives the prompt as it was passed.
            **kwargs: Everything else that the stock method takes.

        Returns:
            As the stock method: the prompt ids as they were passed, followed by the new ones. The output of
            `return_dict_in_generate` also has `visual_token_counts`, `newline_counts` and `token_recovery`, the
            [`TokenRecoveryOutput`] of all images; they are `None` if nothing was compressed.

        Raises:
            ValueError: Inputs that do not fit, or an option that cannot read a compressed prompt.
        """
        section, kwargs = self._section(token_recovery), stock_cache(kwargs)
        stock = super().generate  # type: ignore[misc]
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if section.enabled:
            self._check_generation(generation_config, kwargs)
        if not section.enabled:
            check_pixels(kwargs.get("pixel_values"))
            kwargs["token_recovery"] = {"enabled": False}  # for the prefill's forward
        if kwargs.get("pixel_values") is None or not section.enabled:
            kwargs = self._with_cache(prompt, kwargs, section)
            if section.enabled and prompt is not None and kwargs.get("inputs_embeds") is not None:
                kwargs |= _prompt_callbacks(
                    PassedPrompt(prompt, kwargs.get("attention_mask"), prompt.shape[1]), kwargs
                )
            output = stock(inputs=prompt, generation_config=generation_config, streamer=streamer, **kwargs)
            if not isinstance(output, Tensor):
                output.visual_token_counts = output.newline_counts = output.token_recovery = None
            return output
        if section.position_ids == "original" and kwargs.get("position_ids") is None:
            mask = kwargs.get("attention_mask")
            kwargs["position_ids"] = counted_positions(torch.ones_like(prompt) if mask is None else mask)
        question = QuestionIds(recovery_input_ids, recovery_attention_mask, recovery_rule, recovery_words)
        compressed = self._compress({"input_ids": prompt, **kwargs}, question, section, keeps_last_columns=False)
        width = compressed.inputs["input_ids"].shape[1]
        passed = PassedPrompt(prompt, kwargs.get("attention_mask"), width)
        generation_config, lengths = self._uncut_lengths(generation_config, kwargs, prompt.shape[1], passed.removed)
        streamer = None if streamer is None else PromptStreamer(streamer, prompt)
        options = {**compressed.inputs, **lengths, **_prompt_callbacks(passed, kwargs)}
        output = stock(generation_config=generation_config, streamer=streamer, **options)
        ids = output if isinstance(output, Tensor) else output.sequences
        note_empty_answers(ids[:, width:], self._setting(generation_config, kwargs, "eos_token_id"))
        if isinstance(output, Tensor):
            return passed.whole(output)
        output.sequences = passed.whole(output.sequences)
        output.visual_token_counts, output.newline_counts = compressed.token_counts, compressed.newline_counts
        output.token_recovery = compressed.record
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The stock inputs of a step, with positions that continue the prompt's own.

        `inputs_embeds`, and `cache_position` on 4.57, are named because the stock `generate` looks for them in the
        signature.
        """
        if cache_position is not None:
            kwargs["cache_position"] = cache_position
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = extended_positions(kwargs["position_ids"], input_ids.shape[1])
        if inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1] and is_prefill(kwargs):
            # Prompt lookup proposes tokens before the prompt is read: they are read with it.
            proposed = self.get_input_embeddings()(input_ids[:, inputs_embeds.shape[1] :])
            inputs_embeds = torch.cat([inputs_embeds, proposed], dim=1)
        elif inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1]:
            inputs_embeds = None  # 4.57 would read a single one again with each new token
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    def _get_logits_processor(
        self,
        generation_config: Any,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: Tensor | None = None,
        prefix_allowed_tokens_fn: Any = None,
        logits_processor: Any = None,
        device: Any = None,
        model_kwargs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The stock processors, all of which read the prompt as it was passed."""
        options = {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn, "device": device, **kwargs}
        build = super()._get_logits_processor  # type: ignore[misc]
        if not isinstance(logits_processor, _PromptProcessors):
            options |= {"logits_processor": logits_processor, "model_kwargs": model_kwargs}
            return build(generation_config, input_ids_seq_length, encoder_input_ids, **options)
        prompt, given = logits_processor.prompt, LogitsProcessorList(logits_processor)
        options |= {"logits_processor": given, "model_kwargs": prompt.uncut_mask(model_kwargs)}
        length = None if input_ids_seq_length is None else input_ids_seq_length + prompt.removed
        processors = build(prompt.uncut_lengths(generation_config), length, prompt.ids, **options)
        return _PromptProcessors(prompt, processors)

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The stock criteria, all of which read the prompt as it was passed."""
        build = super()._get_stopping_criteria  # type: ignore[misc]
        if not isinstance(stopping_criteria, _PromptCriteria):
            return build(generation_config, stopping_criteria, *args, **kwargs)
        prompt, given = stopping_criteria.prompt, StoppingCriteriaList(stopping_criteria)
        return _PromptCriteria(prompt, build(prompt.uncut_lengths(generation_config), given, *args, **kwargs))

    def _setting(self, generation_config: Any, kwargs: Mapping[str, Any], name: str, default: Any = None) -> Any:
        """A generation setting from the call, its generation config or the model's, in this order."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        value = getattr(generation_config, name, None)
        return getattr(self.generation_config, name, None) if value in (None, default) else value

    def _check_generation(self, generation_config: Any, kwargs: Mapping[str, Any]) -> None:
        check_encoder_outputs(kwargs)
        if kwargs.get("pixel_values") is not None or kwargs.get("inputs_embeds") is not None:
            for name in ("prefill_chunk_size", "token_healing"):
                if value := self._setting(generation_config, kwargs, name):
                    raise ValueError(
                        f"{name} is {value!r}, which reads the prompt as ids and would lose its images: a compressed "
                        "prompt is short, and is passed to the model as embeddings. Leave it out."
                    )
        if kwargs.get("pixel_values") is not None:
            check_reads_embeddings(self.prepare_inputs_for_generation)
        if kwargs.get("assistant_model") is not None and kwargs.get("pixel_values") is not None:
            raise ValueError(
                "Assisted generation with an assistant_model does not work on a compressed prompt: the assistant "
                "would read other tokens. Use prompt_lookup_num_tokens=, or token_recovery={'enabled': False}."
            )

    def _with_cache(
        self, prompt: Tensor | None, kwargs: dict[str, Any], section: TokenRecoveryConfig
    ) -> dict[str, Any]:
        """The arguments for the stock method if the prompt continues a non-empty cache."""
        past = cache_length(cache_of(kwargs))
        if not past or prompt is None or kwargs.get("pixel_values") is not None:
            return kwargs
        check_continuation(prompt, kwargs, self.config.image_token_id, section)
        if not is_continuation(prompt, kwargs):
            return kwargs
        return {**kwargs, **behind_cache(past, prompt, kwargs.get("inputs_embeds"))}

    def _uncut_lengths(
        self, generation_config: Any, kwargs: Mapping[str, Any], prompt_length: int, cut: int
    ) -> tuple[Any, dict[str, int]]:
        """`max_length` and `min_length` for the shortened prompt, if they were set for the uncut one.

        Returns:
            The generation config, and keyword arguments for the lengths that it does not hold.
        """
        lengths, setting = {}, functools.partial(self._setting, generation_config, kwargs)
        longest, shortest = setting("max_length", default_max_length()), setting("min_length", 0)
        if setting("max_new_tokens") is None and longest not in (None, default_max_length()):
            if longest <= prompt_length:
                raise ValueError(
                    f"max_length is {longest}, but the prompt has {prompt_length} ids as it was passed, which is what "
                    "max_length counts: write max_new_tokens instead."
                )
            lengths["max_length"] = longest - cut
        if setting("min_new_tokens") is None and shortest:
            lengths["min_length"] = max(shortest - cut, 0)
        if generation_config is None or lengths.keys() <= kwargs.keys():
            return generation_config, lengths
        generation_config = copy.deepcopy(generation_config)
        for name in lengths.keys() - kwargs.keys():
            setattr(generation_config, name, lengths.pop(name))
        return generation_config, lengths


@dataclasses.dataclass
class PassedPrompt:
    """The prompt as it was passed to `generate`, which reads a shorter one.

    Args:
        ids: (R, L) int64.
        mask: (R, L), 0 for padding; `None` without padding.
        width: Length of the prompt that the model reads.
    """

    ids: Tensor
    mask: Tensor | None
    width: int

    @property
    def removed(self) -> int:
        """Number of ids that the passed prompt has in addition."""
        return self.ids.shape[1] - self.width

    def whole(self, ids: Tensor) -> Tensor:
        """The passed prompt and the new ids of sequences (R * copies, width + new), a row's copies in succession."""
        prompt = self.ids.repeat_interleave(ids.shape[0] // self.ids.shape[0], dim=0).to(ids.device)
        return torch.cat([prompt, ids[:, self.width :]], dim=1)

    def uncut_lengths(self, generation_config: Any) -> Any:
        """A copy of a config with the lengths that count the passed prompt."""
        config = copy.copy(generation_config)
        for name in ("max_length", "min_length"):
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name) + self.removed)
        return config

    def uncut_mask(self, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments of a step with the passed prompt's mask; as in the stock method there is none without padding."""
        masked = self.mask is not None and not bool((self.mask == 1).all())
        return {**(model_kwargs or {}), "attention_mask": self.mask if masked else None}


class _PromptProcessors(LogitsProcessorList):
    """Logits processors that read the passed prompt in place of the shortened one."""

    def __init__(self, prompt: PassedPrompt, processors: Sequence[Any]) -> None:
        super().__init__(processors)
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return super().__call__(self.prompt.whole(input_ids) if self else input_ids, scores, **kwargs)


class _PromptCriteria(StoppingCriteriaList):
    """Stopping criteria that read the passed prompt in place of the shortened one."""

    def __init__(self, prompt: PassedPrompt, criteria: Sequence[Any]) -> None:
        super().__init__(criteria)
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return super().__call__(self.prompt.whole(input_ids), scores, **kwargs)

    @property
    def max_length(self) -> int | None:
        """The longest sequence, counted with the shortened prompt: stock `generate` compares its own ids with it."""
        longest = super().max_length
        return None if longest is None else longest - self.prompt.removed


def _prompt_callbacks(prompt: PassedPrompt, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The callbacks of a call, marked so that the lists that `generate` builds read the passed prompt."""
    return {
        "logits_processor": _PromptProcessors(prompt, kwargs.get("logits_processor") or []),
        "stopping_criteria": _PromptCriteria(prompt, kwargs.get("stopping_criteria") or []),
    }


class PromptStreamer(BaseStreamer):
    """A streamer that passes the prompt on as it was given, not the shortened one."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt
        self.prompt_shown = False

    def put(self, value: Tensor) -> None:
        """Pass on the prompt first, then new ids as they come."""
        self.streamer.put(value if self.prompt_shown else self.prompt.cpu())
        self.prompt_shown = True

    def end(self) -> None:
        """Pass on the end of the text."""
        self.streamer.end()


__all__ = ["PassedPrompt", "PromptStreamer", "RecCompGenerationMixin"]
