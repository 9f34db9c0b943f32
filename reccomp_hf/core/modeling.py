"""The compressed LLaVA models: from images and prompts to a short sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from .checks import (
    check_call,
    check_encoder_outputs,
    check_feature_layer,
    check_logits_to_keep,
    check_no_cut_logits,
    check_supported,
)
from .compat import image_fields, stock_cache, stock_image_fields
from .configuration import TokenRecoveryConfig
from .features import TokenRecoveryOutput
from .front import FrontMixin, QuestionIds
from .groups import GroupedPictures
from .inner_model import stock_inner_model
from .picture_tokens import Choice
from .prefill import recorded_prefill
from .settings import FIELDS, fields_text
from .splicing import (
    compact_positions,
    cut,
    cut_shifted,
    original_positions,
    pad_token_id,
    padding_id,
    plan_splice,
)
from .tensor_checks import check_ids
from .vision import EncodedImages, check_pixels


@dataclasses.dataclass
class _Compressed:
    """A shortened batch.

    Args:
        inputs: Arguments for the stock model.
        record: The chosen tokens.
        image_features: (tokens, D), the projected tokens of all images.
        image_lengths: Tokens of each image.
        token_counts: (I,) int64, tokens of each image.
        newline_counts: (I,) int64, newlines of each image.
        source: (R, W) int64, the uncut slot that each new slot holds, -1 for padding.
    """

    inputs: dict[str, Any]
    record: TokenRecoveryOutput
    image_features: Tensor
    image_lengths: list[int]
    token_counts: Tensor
    newline_counts: Tensor
    source: Tensor


class RecCompMixin(FrontMixin):
    """Token recovery for a stock LLaVA class, which stands next in the bases."""

    output_class: type

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; fields of the config do not reach the generation config, where transformers puts them.

        There `token_recovery` would take the place of the one that a call of `generate` passes on.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if (generation_config := getattr(model, "generation_config", None)) is not None:
            vars(generation_config).pop("token_recovery", None)
        return loaded

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
        **kwargs: Any,
    ) -> Any:
        """As the stock method on the shortened sequence, see [`RecCompMixin.compress_inputs`]."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs |= {"cache": cache, "past_key_values": past_key_values, **kwargs}
        question = QuestionIds(recovery_input_ids, recovery_attention_mask, recovery_rule, recovery_words)
        return self._compressed_forward(inputs, question, token_recovery)

    def encode_images(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        token_recovery: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> EncodedImages:
        """Run the vision tower once for several calls about the same images.

        Args:
            pixel_values: Images as the processor returns them.
            image_sizes: (I, 2) height and width in pixels of every image; LLaVA-NeXT only.
            token_recovery: Fields of the config section that the later calls will override; a list of them for calls
                that override different ones.
            **kwargs: Feature layer and strategy as in stock LLaVA; other outputs of the processor are ignored.

        Returns:
            [`EncodedImages`], which `generate`, `forward`, `compress_inputs` and `recover` take in place of
            `pixel_values`, without `image_sizes`.

        Raises:
            ValueError: `enabled: false`, which leaves the vision tower to the stock model, or images that do not fit
                `image_sizes`.
        """
        several = isinstance(token_recovery, list | tuple)
        sections = [
            self._section(fields) for fields in cast("list[Any]", token_recovery if several else [token_recovery])
        ]
        if not sections or not all(section.enabled for section in sections):
            raise ValueError("With token_recovery.enabled false the stock model reads pixel_values: pass them to it.")
        return self._encode(pixel_values, image_sizes, sections, self._feature_layer(kwargs))

    @torch.no_grad()
    def recover(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | EncodedImages,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        recovery_rule: Tensor | None = None,
        recovery_words: Tensor | None = None,
        **kwargs: Any,
    ) -> list[TokenRecoveryOutput]:
        """The tokens that stand for each image, and why; the language model is not run.

        Args:
            input_ids: (R, L) int64 prompts with their image placeholders.
            pixel_values: Images of all rows in reading order, from the processor or `encode_images`.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            image_sizes: (I, 2) height and width in pixels of every image; LLaVA-NeXT only.
            token_recovery: Fields of the config section to override for this call.
            recovery_rule: (R,) int64, the rule of each row as the processor writes it, -1 for none; read with `rules`.
            recovery_words: (R, M) int64, the questions' words as LLaVA's tokens, -1 for padding; read by `mmtok`.
            **kwargs: `vision_feature_layer` and `vision_feature_select_strategy` as in stock LLaVA; other outputs of
                the processor are ignored.

        Returns:
            One [`TokenRecoveryOutput`] per image, with B = 1, or a row per tile for LLaVA-NeXT.

        Raises:
            ValueError: Placeholders, images or questions that do not fit.
        """
        section, layer = self._section(token_recovery), self._feature_layer(kwargs)
        question = QuestionIds(recovery_input_ids, recovery_attention_mask, recovery_rule, recovery_words)
        check_ids("input_ids", input_ids, 2)
        inputs = (input_ids, pixel_values, image_sizes, question, section, layer)
        chosen = self._read_pictures(*inputs, projects=False)
        chosen.sync_and_validate()
        return cast("Choice | GroupedPictures", chosen.pictures).records()  # because nothing is projected

    def compress_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | EncodedImages | None = None,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        recovery_rule: Tensor | None = None,
        recovery_words: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], TokenRecoveryOutput | None]:
        """Shorten a batch: images become their recovered tokens, and the prompts are cut to match.

        Args:
            input_ids: (R, L) int64 with the placeholders of every image.
            attention_mask: (R, L), 0 for padding; `None` for no padding.
            position_ids: (R, L) int64 positions of the uncut sequence, `None` for the usual ones.
            labels: (R, L) int64, cut with the prompt. Without labels each row keeps its right padding, so that the
                last columns of the batch stay the last ones; with them a batch that is padded on the right alone
                becomes as short as its longest row.
            pixel_values: Images of all rows in reading order, from the processor or `encode_images`.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            image_sizes: (I, 2) height and width in pixels of every image; LLaVA-NeXT only.
            token_recovery: Fields of the config section to override for this call.
            recovery_rule: (R,) int64, the rule of each row as the processor writes it, -1 for none; read with `rules`.
            recovery_words: (R, M) int64, the questions' words as LLaVA's tokens, -1 for padding; read by `mmtok`.
            **kwargs: `vision_feature_layer` and `vision_feature_select_strategy` as in stock LLaVA; everything else
                is passed through.

        Returns:
            The shortened inputs (`input_ids`, `inputs_embeds`, `attention_mask`, and `labels` and `position_ids`
            where they apply), which `forward` and `generate` take, and the [`TokenRecoveryOutput`] of all images.
            Without images, or with `enabled: false`, the inputs are returned as they are, and `None`.

        Raises:
            ValueError: Placeholders, images or questions that do not fit.
        """
        section = self._section(token_recovery)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"position_ids": position_ids, "labels": labels, "pixel_values": pixel_values}
        inputs |= {"image_sizes": image_sizes, **kwargs}
        if pixel_values is None or not section.enabled:
            check_pixels(pixel_values)
            inputs |= {"recovery_input_ids": recovery_input_ids, "recovery_attention_mask": recovery_attention_mask}
            inputs |= {"recovery_rule": recovery_rule, "recovery_words": recovery_words}
            inputs |= {"token_recovery": token_recovery}
            return {name: value for name, value in inputs.items() if value is not None}, None
        question = QuestionIds(recovery_input_ids, recovery_attention_mask, recovery_rule, recovery_words)
        compressed = self._compress(inputs, question, section)
        return compressed.inputs, compressed.record

    def _compress(
        self,
        inputs: dict[str, Any],
        question: QuestionIds,
        section: TokenRecoveryConfig,
        *,
        keeps_last_columns: bool = True,
    ) -> _Compressed:
        """Shorten a batch that has images, see [`RecCompMixin.compress_inputs`] and [`plan_splice`]."""
        inputs = dict(inputs)
        check_call(self.config, section, inputs)
        input_ids, labels, position_ids = (inputs.pop(name, None) for name in ("input_ids", "labels", "position_ids"))
        attention_mask, pixel_values = inputs.pop("attention_mask", None), inputs.pop("pixel_values")
        layer = self._feature_layer(inputs)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sizes = inputs.pop("image_sizes", None)
        chosen = self._read_pictures(input_ids, pixel_values, sizes, question, section, layer)
        placeholders, kept_logits = chosen.placeholders, check_logits_to_keep(inputs.get("logits_to_keep"))
        lengths = chosen.pictures.lengths.to(input_ids.device)
        keeps_last_columns &= labels is None and inputs.get("shift_labels") is None
        splice = plan_splice(placeholders, attention_mask, lengths, kept_logits, keeps_last_columns=keeps_last_columns)
        longest_before, longest_after, dropped_logits = chosen.sync_and_validate(splice)
        check_no_cut_logits(dropped_logits)
        # Padding that every row has stays, so that cutting nothing changes nothing.
        source = splice.source(input_ids.shape[1] - longest_before + longest_after)
        tokens = self._tokens(chosen.pictures)
        features = tokens.packed()
        with record_function("reccomp::splice"):
            new_ids = cut(input_ids, source, padding_id(input_ids, splice, pad_token_id(self.config)))
            embeds = self.get_input_embeddings()(new_ids)
            features = features.to(embeds.device, embeds.dtype)
            is_image = cut(placeholders.is_placeholder, source, False).unsqueeze(-1).to(embeds.device)
            shortened = {
                **inputs,
                "input_ids": new_ids,
                "inputs_embeds": embeds.masked_scatter(is_image, features),
                "attention_mask": cut(attention_mask, source, 0),
            }
            if labels is not None:
                shortened["labels"] = cut(labels.long(), source, -100)
            if inputs.get("shift_labels") is not None:
                shortened["shift_labels"] = cut_shifted(inputs["shift_labels"].long(), splice, source)
            if section.position_ids == "original":
                shortened["position_ids"] = original_positions(
                    position_ids, placeholders, tokens.places.to(source.device), source
                )
            elif position_ids is not None:
                shortened["position_ids"] = compact_positions(position_ids, splice, source)
        counts = [number.to(input_ids.device) for number in (tokens.token_counts, tokens.newline_counts)]
        lengths_read = tokens.image_lengths or []
        return _Compressed(shortened, tokens.record, features, lengths_read, counts[0], counts[1], source)

    def _compressed_forward(
        self, inputs: dict[str, Any], question: QuestionIds, token_recovery: Mapping[str, Any] | None
    ) -> Any:
        """The stock `forward` on the shortened inputs, its output with the counts."""
        inputs = stock_cache({name: value for name, value in inputs.items() if value is not None})
        stock = super().forward  # type: ignore[misc]
        if "pixel_values" not in inputs and "inputs_embeds" in inputs:
            inputs.pop("input_ids", None)  # what compress_inputs returns holds both
        if "pixel_values" not in inputs or not (section := self._section(token_recovery)).enabled:
            check_pixels(inputs.get("pixel_values"))
            if inputs.get("mm_encoder_outputs") and self._section(token_recovery).enabled:
                check_encoder_outputs(inputs)
            with stock_inner_model() if "pixel_values" in inputs else contextlib.nullcontext():
                output = self._language(stock, inputs)
            return self.output_class(**output, **stock_image_fields(output)) if isinstance(output, Mapping) else output
        compressed = self._compress(inputs, question, section)
        output = self._language(stock, {**compressed.inputs, "input_ids": None})
        if not isinstance(output, Mapping):
            return output
        counts = {"visual_token_counts": compressed.token_counts, "newline_counts": compressed.newline_counts}
        images = image_fields(self.output_class, compressed.image_features, compressed.image_lengths)
        return self.output_class(**{**output, **counts, **images})

    def _language(self, stock: Any, inputs: dict[str, Any]) -> Any:
        """The output of the stock `forward`, or its fields by a CUDA graph if there is one for it."""
        if self._graphs is not None and "inputs_embeds" in inputs and hasattr(self, "lm_head"):
            fields = recorded_prefill(self, self._graphs, stock, inputs)
            if fields is not None:
                return fields
        return stock(**inputs)

    def _feature_layer(self, inputs: dict[str, Any]) -> int:
        """The hidden state that the projector reads; removes a call's own value from its inputs."""
        layer, strategy = (inputs.pop(f"vision_feature_{name}", None) for name in ("layer", "select_strategy"))
        check_feature_layer(self.config, layer, strategy)
        return self.config.vision_feature_layer if layer is None else layer

    def _section(self, overrides: Mapping[str, Any] | None) -> TokenRecoveryConfig:
        """The config's section with a call's overrides, checked against the model."""
        section = _overridden(self.config.token_recovery, overrides)
        if section.text_encoder_config != self.config.token_recovery.text_encoder_config:
            raise ValueError("token_recovery.text_encoder_config belongs to the weights; a call cannot change it.")
        section.validate()
        check_supported(self.config, section)
        return section


def _overridden(section: TokenRecoveryConfig, overrides: Mapping[str, Any] | None) -> TokenRecoveryConfig:
    """A section with a call's overrides; equal ones are read once, which takes half a millisecond."""
    if not isinstance(overrides, Mapping):
        return section.replace(overrides)
    try:
        texts = fields_text(section), json.dumps(dict(overrides))
    except (TypeError, ValueError, RecursionError):
        return section.replace(overrides)
    return section.replace(overrides) if texts[0] is None else _read_overrides(*texts)


@functools.lru_cache(maxsize=64)
def _read_overrides(fields: str, overrides: str) -> TokenRecoveryConfig:
    section = TokenRecoveryConfig(**dict(zip(FIELDS, json.loads(fields), strict=True)))
    return section.replace(json.loads(overrides))


__all__ = ["RecCompMixin"]
