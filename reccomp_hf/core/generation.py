"""Generation on a shortened prompt that behaves like generation on the prompt as it was passed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .checks import cache_length, check_continuation, check_encoder_outputs, is_continuation
from .compat import behind_cache, cache_of, default_max_length, extended_positions, is_prefill, stock_cache
from .configuration import TokenRecoveryConfig
from .modeling import RecCompMixin
from .splicing import counted_positions
from .vision import check_pixels


class RecCompGenerationMixin(RecCompMixin):
    """Token recovery for a stock LLaVA class that generates."""

    generation_config: Any

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
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: Any = None,
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
            labels: (R, L) int64 for the uncut sequence; cut along with it.
            logits_to_keep: As in the stock method.
            mm_encoder_outputs: As in the stock method of transformers 5, for the uncompressed model only.
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
        return self._compressed_forward(inputs, (recovery_input_ids, recovery_attention_mask), token_recovery)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        token_recovery: Mapping[str, Any] | None = None,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock method; images are compressed once, before the prefill.

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
            streamer: As in the stock method; it receives the prompt as it was passed.
            **kwargs: Everything else that the stock method takes.

        Returns:
            As the stock method: the prompt ids as they were passed, followed by the new ones. The output of
            `return_dict_in_generate` also has `visual_token_counts`, `newline_counts` and `token_recovery`, the
            [`TokenRecoveryOutput`] of all images; they are `None` if nothing was compressed.

        Raises:
            ValueError: Inputs that do not fit, or an assistant model.
        """
        section, kwargs = self._section(token_recovery), stock_cache(kwargs)
        stock = super().generate  # type: ignore[misc]
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if section.enabled:
            self._check_generation(kwargs)
        if not section.enabled:
            check_pixels(kwargs.get("pixel_values"))
            kwargs["token_recovery"] = {"enabled": False}  # for the prefill's forward
        if kwargs.get("pixel_values") is None or not section.enabled:
            kwargs = self._with_cache(prompt, kwargs, section)
            output = stock(inputs=prompt, generation_config=generation_config, streamer=streamer, **kwargs)
            if not isinstance(output, Tensor):
                output.visual_token_counts = output.newline_counts = output.token_recovery = None
            return output
        if section.position_ids == "original" and kwargs.get("position_ids") is None:
            mask = kwargs.get("attention_mask")
            kwargs["position_ids"] = counted_positions(torch.ones_like(prompt) if mask is None else mask)
        question = (recovery_input_ids, recovery_attention_mask)
        compressed = self._compress({"input_ids": prompt, **kwargs}, question, section)
        width = compressed.inputs["input_ids"].shape[1]
        generation_config, lengths = self._uncut_lengths(
            generation_config, kwargs, prompt.shape[1], prompt.shape[1] - width
        )
        streamer = None if streamer is None else PromptStreamer(streamer, prompt)
        output = stock(generation_config=generation_config, streamer=streamer, **{**compressed.inputs, **lengths})
        sequences = output if isinstance(output, Tensor) else output.sequences
        full = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0).to(sequences.device)
        full = torch.cat([full, sequences[:, width:]], dim=1)
        if isinstance(output, Tensor):
            return full
        output.sequences = full
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

    def _check_generation(self, kwargs: Mapping[str, Any]) -> None:
        check_encoder_outputs(kwargs)
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

        def setting(name: str, default: Any) -> Any:
            if kwargs.get(name) is not None:
                return kwargs[name]
            value = getattr(generation_config, name, None)
            return getattr(self.generation_config, name, None) if value in (None, default) else value

        lengths = {}
        longest, shortest = setting("max_length", default_max_length()), setting("min_length", 0)
        if setting("max_new_tokens", None) is None and longest not in (None, default_max_length()):
            if longest <= prompt_length:
                raise ValueError(
                    f"max_length is {longest}, but the prompt has {prompt_length} ids as it was passed, which is what "
                    "max_length counts: write max_new_tokens instead."
                )
            lengths["max_length"] = longest - cut
        if setting("min_new_tokens", None) is None and shortest:
            lengths["min_length"] = max(shortest - cut, 0)
        if generation_config is None or lengths.keys() <= kwargs.keys():
            return generation_config, lengths
        generation_config = copy.deepcopy(generation_config)
        for name in lengths.keys() - kwargs.keys():
            setattr(generation_config, name, lengths.pop(name))
        return generation_config, lengths


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


__all__ = ["PromptStreamer", "RecCompGenerationMixin"]
