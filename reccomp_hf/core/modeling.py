"""The compressed LLaVA models: from images and prompts to a short sequence."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.profiler import record_function

from .checks import (
    check_call,
    check_encoder_outputs,
    check_feature_layer,
    check_finite,
    check_ids,
    check_logits_to_keep,
    check_no_cut_logits,
    check_question,
    check_supported,
    no_question_hint,
)
from .compat import clip_vision_model, image_fields, parameter, stock_cache, stock_image_fields
from .configuration import TokenRecoveryConfig
from .features import TokenRecoveryOutput
from .layout import ImageLayout
from .methods.registry import get_method
from .picture_tokens import Choice, Question, choose_tokens, window_mask
from .splicing import (
    PlaceholderMap,
    Splice,
    check_placeholders,
    compact_positions,
    cut,
    cut_shifted,
    map_placeholders,
    original_positions,
    pad_token_id,
    padding_id,
    plan_splice,
)
from .text_encoder import RecoveryModulesMixin
from .vision import EncodedImages, check_not_empty, check_pixels, needed_states, vision_states

_QuestionIds: TypeAlias = "tuple[Tensor | None, Tensor | None]"  # recovery_input_ids, recovery_attention_mask


@dataclasses.dataclass
class _ChosenPrompts:
    """A batch of prompts and the tokens chosen for its images, before anything is read from the device.

    Args:
        choice: The chosen tokens.
        placeholders: The image placeholders in the prompts.
        missing_question: (R,) bool, rows with an image and without a question.
    """

    choice: Choice
    placeholders: PlaceholderMap
    missing_question: Tensor


@dataclasses.dataclass
class _Compressed:
    """A shortened batch.

    Args:
        inputs: Arguments for the stock model.
        record: The chosen tokens.
        image_features: (K, D) for each image, its projected tokens.
        token_counts: (I,) int64, tokens of each image.
        newline_counts: (I,) int64, newlines of each image.
    """

    inputs: dict[str, Any]
    record: TokenRecoveryOutput
    image_features: tuple[Tensor, ...]
    token_counts: Tensor
    newline_counts: Tensor


class RecCompMixin(RecoveryModulesMixin):
    """Token recovery for a stock LLaVA class, which stands next in the bases."""

    get_input_embeddings: Any
    output_class: type

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
        **kwargs: Any,
    ) -> Any:
        """As the stock method on the shortened sequence, see [`RecCompMixin.compress_inputs`]."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs |= {"cache": cache, "past_key_values": past_key_values, **kwargs}
        return self._compressed_forward(inputs, (recovery_input_ids, recovery_attention_mask), token_recovery)

    def encode_images(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> EncodedImages:
        """Run the vision tower once for several calls about the same images.

        Args:
            pixel_values: Images as the processor returns them.
            image_sizes: (I, 2) height and width in pixels of every image; LLaVA-NeXT only.
            token_recovery: Fields of the config section that the later calls will override.
            **kwargs: Feature layer and strategy as in stock LLaVA; other outputs of the processor are ignored.

        Returns:
            [`EncodedImages`], which `generate`, `forward`, `compress_inputs` and `recover` take in place of
            `pixel_values`, without `image_sizes`.

        Raises:
            ValueError: `enabled: false`, which leaves the vision tower to the stock model, or images that do not fit
                `image_sizes`.
        """
        section = self._section(token_recovery)
        if not section.enabled:
            raise ValueError("With token_recovery.enabled false the stock model reads pixel_values: pass them to it.")
        return self._encode(pixel_values, image_sizes, section, self._feature_layer(kwargs))

    @torch.no_grad()
    def recover(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | EncodedImages,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
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
            **kwargs: `vision_feature_layer` and `vision_feature_select_strategy` as in stock LLaVA; other outputs of
                the processor are ignored.

        Returns:
            One [`TokenRecoveryOutput`] per image, with B = 1, or a row per tile for LLaVA-NeXT.

        Raises:
            ValueError: Placeholders, images or questions that do not fit.
        """
        section, layer = self._section(token_recovery), self._feature_layer(kwargs)
        question = (recovery_input_ids, recovery_attention_mask)
        check_ids("input_ids", input_ids, 2)
        chosen = self._choose_tokens(input_ids, pixel_values, image_sizes, question, section, layer)
        self._sync_and_validate(chosen)
        return chosen.choice.record().split(chosen.choice.layout.tiles)

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
        **kwargs: Any,
    ) -> tuple[dict[str, Any], TokenRecoveryOutput | None]:
        """Shorten a batch: images become their recovered tokens, and the prompts are cut to match.

        Args:
            input_ids: (R, L) int64 with the placeholders of every image.
            attention_mask: (R, L), 0 for padding; `None` for no padding.
            position_ids: (R, L) int64 positions of the uncut sequence, `None` for the usual ones.
            labels: (R, L) int64, cut with the prompt.
            pixel_values: Images of all rows in reading order, from the processor or `encode_images`.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            image_sizes: (I, 2) height and width in pixels of every image; LLaVA-NeXT only.
            token_recovery: Fields of the config section to override for this call.
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
            inputs["token_recovery"] = token_recovery
            return {name: value for name, value in inputs.items() if value is not None}, None
        compressed = self._compress(inputs, (recovery_input_ids, recovery_attention_mask), section)
        return compressed.inputs, compressed.record

    def _compress(self, inputs: dict[str, Any], question: _QuestionIds, section: TokenRecoveryConfig) -> _Compressed:
        """Shorten a batch that has images, see [`RecCompMixin.compress_inputs`]."""
        inputs = dict(inputs)
        check_call(self.config, section, inputs)
        input_ids, labels, position_ids = (inputs.pop(name, None) for name in ("input_ids", "labels", "position_ids"))
        attention_mask, pixel_values = inputs.pop("attention_mask", None), inputs.pop("pixel_values")
        layer = self._feature_layer(inputs)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sizes = inputs.pop("image_sizes", None)
        chosen = self._choose_tokens(input_ids, pixel_values, sizes, question, section, layer)
        choice, placeholders = chosen.choice, chosen.placeholders
        kept_logits = check_logits_to_keep(inputs.get("logits_to_keep"))
        splice = plan_splice(placeholders, attention_mask, choice.lengths.to(input_ids.device), kept_logits)
        longest_before, longest_after = self._sync_and_validate(chosen, splice)
        # Padding that every row has stays, so that cutting nothing changes nothing.
        source = splice.source(input_ids.shape[1] - longest_before + longest_after)
        with record_function("reccomp::merge"):
            record = choice.record()
        with record_function("reccomp::projector"):
            newline = parameter(self._llava, "image_newline") if choice.layout.has_newlines else None
            features, places = choice.projected_tokens(record, self._llava.multi_modal_projector, newline)
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
                shortened["labels"] = cut(labels, source, -100)
            if inputs.get("shift_labels") is not None:
                shortened["shift_labels"] = cut_shifted(inputs["shift_labels"], splice, source)
            if section.position_ids == "original":
                shortened["position_ids"] = original_positions(
                    position_ids, placeholders, places.to(source.device), source
                )
            elif position_ids is not None:
                shortened["position_ids"] = compact_positions(position_ids, splice, source)
        counts = (number.to(input_ids.device) for number in (choice.token_counts, choice.newline_counts))
        return _Compressed(shortened, record, features.split(choice.image_lengths), *counts)

    def _compressed_forward(
        self, inputs: dict[str, Any], question: _QuestionIds, token_recovery: Mapping[str, Any] | None
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
            output = stock(**inputs)
            return self.output_class(**output, **stock_image_fields(output)) if isinstance(output, Mapping) else output
        compressed = self._compress(inputs, question, section)
        output = stock(**{**compressed.inputs, "input_ids": None})
        if not isinstance(output, Mapping):
            return output
        counts = {"visual_token_counts": compressed.token_counts, "newline_counts": compressed.newline_counts}
        return self.output_class(**{**output, **counts, **image_fields(self.output_class, compressed.image_features)})

    def _encode(
        self, pixel_values: Tensor, image_sizes: Tensor | None, section: TokenRecoveryConfig, feature_layer: int
    ) -> EncodedImages:
        """`encode_images` with its settings; no graph is built for a frozen tower."""
        check_not_empty(pixel_values)
        pixel_values, layout = self._layout(pixel_values, image_sizes)
        tower, needed = clip_vision_model(self._llava.vision_tower), self._needed_states(section, feature_layer)
        frozen = not any(weight.requires_grad for weight in tower.parameters())
        with record_function("reccomp::vision_tower"), torch.no_grad() if frozen else contextlib.nullcontext():
            return EncodedImages(vision_states(tower, pixel_values, needed), layout, self._grid(pixel_values))

    def _needed_states(self, section: TokenRecoveryConfig, feature_layer: int) -> set[int]:
        """The vision tower's hidden states that a section reads from this model."""
        blocks = len(clip_vision_model(self._llava.vision_tower).encoder.layers)
        return needed_states(section, feature_layer, blocks, self._reads_question(section))

    def _choose_tokens(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | EncodedImages,
        image_sizes: Tensor | None,
        question: _QuestionIds,
        section: TokenRecoveryConfig,
        feature_layer: int,
    ) -> _ChosenPrompts:
        """Run the vision tower and choose tokens; for LLaVA-1.5 nothing is read from the device."""
        reads_question = self._reads_question(section)
        if reads_question:
            check_question(*question, input_ids.shape[0], section)
        if isinstance(pixel_values, EncodedImages):
            encoded = pixel_values
        else:
            encoded = self._encode(pixel_values, image_sizes, section, feature_layer)
        placeholders = map_placeholders(
            input_ids == self.config.image_token_id,
            torch.tensor(encoded.layout.lengths).to(input_ids.device, non_blocking=True),
        )
        missing, asked = torch.zeros_like(placeholders.per_row, dtype=torch.bool), None
        if question[0] is not None and reads_question:
            windows = window_mask(question[0], question[1]).to(input_ids.device)
            missing = (placeholders.per_row > 0) & ~windows.any(-1)
            row_of_tile = placeholders.row[encoded.layout.image_of_tile(input_ids.device)]
            asked = Question(question[0], windows, row_of_tile)
        choice = choose_tokens(
            clip_vision_model(self._llava.vision_tower),
            self.token_recovery,
            encoded,
            asked,
            section,
            feature_layer,
            num_heads=self.config.vision_config.num_attention_heads,
            projector=self._llava.multi_modal_projector,
        )
        return _ChosenPrompts(choice, placeholders, missing)

    def _sync_and_validate(self, chosen: _ChosenPrompts, splice: Splice | None = None) -> tuple[int, int]:
        """The one read from the device: sets the choice's sizes, and checks features, placeholders and questions.

        Returns:
            The first two sizes of a splice; 0 without one.

        Raises:
            ValueError: Features that are not finite; placeholders, questions or places of logits that do not fit.
        """
        choice, per_row = chosen.choice, chosen.placeholders.per_row
        row_sizes = per_row.new_zeros(3) if splice is None else splice.sizes
        wanted = [per_row, chosen.missing_question.long(), row_sizes, *choice.unread, choice.non_finite]
        values = torch.cat([value.to(per_row.device) for value in wanted]).tolist()
        rows, tiles = len(per_row), sum(choice.layout.tiles)
        check_finite(values[-tiles:], choice.layout.tiles)
        check_placeholders(values[:rows], choice.layout.lengths)
        missing, numbers = values[rows : 2 * rows], values[2 * rows : -tiles]
        if any(missing):
            raise ValueError(
                f"Row {missing.index(1)} has an image but no question: its recovery_attention_mask is all 0. Put a "
                f"question into the user turn or pass recovery_text= to the processor; "
                f"{no_question_hint(choice.section)}"
            )
        check_no_cut_logits(numbers[2])
        choice.read(numbers[3:])
        return numbers[0], numbers[1]

    def _layout(self, pixel_values: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, ImageLayout]:
        """Tiles (T, 3, H, W) of all images, and the placeholders that stand for their patches."""
        rows, columns = self._grid(pixel_values)
        return pixel_values, ImageLayout.of_grids(len(pixel_values), rows * columns)

    def _feature_layer(self, inputs: dict[str, Any]) -> int:
        """The hidden state that the projector reads; removes a call's own value from its inputs."""
        layer, strategy = (inputs.pop(f"vision_feature_{name}", None) for name in ("layer", "select_strategy"))
        check_feature_layer(self.config, layer, strategy)
        return self.config.vision_feature_layer if layer is None else layer

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        patch = self.config.vision_config.patch_size
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def _section(self, overrides: Mapping[str, Any] | None) -> TokenRecoveryConfig:
        """The config's section with a call's overrides, checked against the model."""
        section = self.config.token_recovery.replace(overrides)
        if section.text_encoder_config != self.config.token_recovery.text_encoder_config:
            raise ValueError("token_recovery.text_encoder_config belongs to the weights; a call cannot change it.")
        check_supported(self.config, section)
        section.validate()
        return section

    def _reads_question(self, section: TokenRecoveryConfig) -> bool:
        return self.token_recovery is not None and get_method(section.method).reads_question(section)


__all__ = ["RecCompMixin"]
