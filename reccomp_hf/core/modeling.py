"""What the compressed LLaVA models share: from pictures and prompts to a short sequence, and generation on it."""

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
    check_question,
    check_supported,
    without_question,
)
from .choosing import assemble_tokens, select_tokens
from .compat import clip_vision_model, image_fields, parameter, stock_cache, stock_image_fields
from .configuration import TokenRecoveryConfig
from .features import TokenRecoveryOutput, TokenSelection, VisualFeatures
from .layout import ImageLayout
from .methods.registry import get_method
from .picture_tokens import Question, projected_tokens, visual_features, window_mask
from .splicing import (
    PlaceholderMap,
    check_placeholders,
    compact_positions,
    cut,
    map_placeholders,
    original_positions,
    padding_id,
    plan_splice,
)
from .text_encoder import RecoveryModulesMixin
from .vision import EncodedImages, check_pixels, check_states, needed_states, vision_states

_Question: TypeAlias = "tuple[Tensor | None, Tensor | None]"  # recovery_input_ids, recovery_attention_mask


@dataclasses.dataclass
class _Pictures:
    """What a batch's pictures, prompts and questions come to before anything is read from the device."""

    features: VisualFeatures
    selection: TokenSelection
    layout: ImageLayout
    placeholders: PlaceholderMap
    missing_question: Tensor  # (R,) bool
    without_question: str  # what a call can do that has none
    token_counts: Tensor  # (I,) int64
    newline_counts: Tensor  # (I,) int64


@dataclasses.dataclass
class _Compressed:
    """A shortened batch."""

    inputs: dict[str, Any]
    record: TokenRecoveryOutput
    image_features: Tensor  # (tokens, D)
    token_counts: Tensor  # (I,) int64
    newline_counts: Tensor  # (I,) int64


@dataclasses.dataclass
class _Read:
    """The numbers that shapes depend on, read from the device once."""

    sizes: list[int]  # of the selection, see TokenSelection.sizes
    longest_image: int  # tokens, newlines included
    image_tokens: int  # of all images, newlines included
    rows_before: int  # longest row, padding excluded
    rows_after: int


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
        """Run the vision tower once for several calls about the same pictures.

        Args:
            pixel_values: Pictures as the processor gives them.
            image_sizes: (I, 2) height and width in pixels of every picture; LLaVA-NeXT only.
            token_recovery: Fields of the config section that the later calls will override.
            **kwargs: `vision_feature_layer` and `vision_feature_select_strategy` as in stock LLaVA; other outputs of
                the processor are not used.

        Returns:
            What `generate`, `forward`, `compress_inputs` and `recover` take in place of `pixel_values`, then without
            `image_sizes`.

        Raises:
            ValueError: `enabled: false`, which leaves the vision tower to the stock model, or pictures that do not
                fit `image_sizes`.
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
        """Which tokens stand for each picture, and why; nothing is given to the language model.

        Args:
            input_ids: (R, L) int64 prompts with their image placeholders.
            pixel_values: Pictures of all rows in reading order, as the processor or `encode_images` gives them.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            image_sizes: (I, 2) height and width in pixels of every picture; LLaVA-NeXT only.
            token_recovery: Fields of the config section to override for this call.
            **kwargs: `vision_feature_layer` and `vision_feature_select_strategy` as in stock LLaVA; other outputs of
                the processor are not used.

        Returns:
            One [`TokenRecoveryOutput`] per picture, with B = 1, or a row per tile for LLaVA-NeXT.

        Raises:
            ValueError: Placeholders, pictures or questions that do not fit.
        """
        section = self._section(token_recovery)
        question = (recovery_input_ids, recovery_attention_mask)
        pictures = self._look(input_ids, pixel_values, image_sizes, question, section, self._feature_layer(kwargs))
        read = self._read(pictures, pictures.placeholders.per_row[:0])
        record = assemble_tokens(pictures.features, pictures.selection, section, read.sizes)
        return record.split(pictures.layout.tiles)

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
        """Shorten a batch: pictures become their recovered tokens, and the prompts are cut to match.

        Args:
            input_ids: (R, L) int64 with the image placeholders of every picture.
            attention_mask: (R, L), 0 for padding; `None` for no padding.
            position_ids: (R, L) int64 positions of the uncut sequence, `None` for the usual ones.
            labels: (R, L) int64, cut with the prompt.
            pixel_values: Pictures of all rows in reading order, as the processor or `encode_images` gives them.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            image_sizes: (I, 2) height and width in pixels of every picture; LLaVA-NeXT only.
            token_recovery: Fields of the config section to override for this call.
            **kwargs: `vision_feature_layer` and `vision_feature_select_strategy` as in stock LLaVA; everything else
                is passed through.

        Returns:
            The shortened inputs (`input_ids`, `inputs_embeds`, `attention_mask`, and `labels` and `position_ids`
            where they apply), which `forward` and `generate` take, and the [`TokenRecoveryOutput`] of all pictures.
            Without pictures, or with `enabled: false`, the inputs come back as they are, and `None`.

        Raises:
            ValueError: Placeholders, pictures or questions that do not fit.
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

    def _compress(self, inputs: dict[str, Any], question: _Question, section: TokenRecoveryConfig) -> _Compressed:
        """`compress_inputs` once there is something to compress."""
        inputs = dict(inputs)
        check_call(self.config, section, inputs)
        input_ids, labels, position_ids = (inputs.pop(name, None) for name in ("input_ids", "labels", "position_ids"))
        attention_mask, pixel_values = inputs.pop("attention_mask", None), inputs.pop("pixel_values")
        layer = self._feature_layer(inputs)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pictures = self._look(input_ids, pixel_values, inputs.pop("image_sizes", None), question, section, layer)
        placeholders = pictures.placeholders
        splice = plan_splice(placeholders, attention_mask, pictures.token_counts + pictures.newline_counts)
        read = self._read(pictures, splice.sizes)
        # Padding that every row has stays, so that cutting nothing changes nothing.
        source = splice.source(input_ids.shape[1] - read.rows_before + read.rows_after)
        with record_function("reccomp::merge"):
            record = assemble_tokens(pictures.features, pictures.selection, section, read.sizes)
        with record_function("reccomp::projector"):
            features, places = self._image_features(pictures, record, read)
        with record_function("reccomp::splice"):
            new_ids = cut(input_ids, source, padding_id(input_ids, splice, _pad_token_id(self.config)))
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
            if section.position_ids == "original":
                shortened["position_ids"] = original_positions(
                    position_ids, placeholders, places.to(source.device), source
                )
            elif position_ids is not None:
                shortened["position_ids"] = compact_positions(position_ids, splice, source)
        return _Compressed(shortened, record, features, pictures.token_counts, pictures.newline_counts)

    def _image_features(self, pictures: _Pictures, record: TokenRecoveryOutput, read: _Read) -> tuple[Tensor, Tensor]:
        """Projected tokens of all images in the order of the prompt (tokens, D), and their places (I, length)."""
        newline = parameter(self._llava, "image_newline") if pictures.layout.has_newlines else None
        return projected_tokens(
            self._llava.multi_modal_projector,
            newline,
            pictures.layout,
            pictures.selection,
            record,
            pictures.token_counts + pictures.newline_counts,
            sizes=read.sizes,
            longest=read.longest_image,
            total=read.image_tokens,
        )

    def _compressed_forward(
        self, inputs: dict[str, Any], question: _Question, token_recovery: Mapping[str, Any] | None
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
        pixel_values, layout = self._layout(pixel_values, image_sizes)
        tower, needed = clip_vision_model(self._llava.vision_tower), self._needed_states(section, feature_layer)
        frozen = not any(weight.requires_grad for weight in tower.parameters())
        with record_function("reccomp::vision_tower"), torch.no_grad() if frozen else contextlib.nullcontext():
            return EncodedImages(vision_states(tower, pixel_values, needed), layout, self._grid(pixel_values))

    def _needed_states(self, section: TokenRecoveryConfig, feature_layer: int) -> set[int]:
        """The vision tower's hidden states that a section reads from this model."""
        blocks = len(clip_vision_model(self._llava.vision_tower).encoder.layers)
        return needed_states(section, feature_layer, blocks, self._reads_question(section))

    def _look(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | EncodedImages,
        image_sizes: Tensor | None,
        question: _Question,
        section: TokenRecoveryConfig,
        vision_feature_layer: int,
    ) -> _Pictures:
        """Run the vision tower and choose tokens; for LLaVA-1.5 nothing is read from the device."""
        reads_question = self._reads_question(section)
        if reads_question:
            check_question(question[0], input_ids.shape[0], section)
        if isinstance(pixel_values, EncodedImages):
            encoded = pixel_values
        else:
            encoded = self._encode(pixel_values, image_sizes, section, vision_feature_layer)
        check_states(encoded.states, self._needed_states(section, vision_feature_layer))
        tower = clip_vision_model(self._llava.vision_tower)
        device = encoded.states[vision_feature_layer % (len(tower.encoder.layers) + 1)].device
        layout = encoded.layout.to(device).keeping(section.newlines)
        placeholders = map_placeholders(
            input_ids == self.config.image_token_id,
            torch.tensor(layout.lengths).to(input_ids.device, non_blocking=True),
        )
        missing, asked = torch.zeros_like(placeholders.per_row, dtype=torch.bool), None
        if question[0] is not None and reads_question:
            windows = window_mask(question[0], question[1]).to(input_ids.device)
            missing = (placeholders.per_row > 0) & ~windows.any(-1)
            row_of_tile = placeholders.row[layout.image_of_tile(input_ids.device)]
            asked = Question(question[0], windows, row_of_tile)
        features = visual_features(
            tower,
            self.token_recovery,
            dataclasses.replace(encoded, layout=layout),
            asked,
            section,
            vision_feature_layer,
            num_heads=self.config.vision_config.num_attention_heads,
            projector=self._llava.multi_modal_projector,
        )
        with record_function("reccomp::select"):
            selection = select_tokens(features, section)
        tokens, newlines = (counts.to(input_ids.device) for counts in layout.counts(selection))
        advice = without_question(section)
        return _Pictures(features, selection, layout, placeholders, missing, advice, tokens, newlines)

    def _read(self, pictures: _Pictures, row_sizes: Tensor) -> _Read:
        """The one read from the device; validates what could not be before."""
        known, per_row = pictures.selection.known_sizes, pictures.placeholders.per_row
        lengths = pictures.token_counts + pictures.newline_counts
        wanted = [per_row, pictures.missing_question.long(), row_sizes]
        if known is None:
            wanted += [pictures.selection.sizes, torch.stack([lengths.max(), lengths.sum()])]
        values = torch.cat([value.to(per_row.device) for value in wanted]).tolist()
        rows = len(per_row)
        check_placeholders(values[:rows], pictures.layout.lengths)
        missing, numbers = values[rows : 2 * rows], values[2 * rows :]
        if any(missing):
            raise ValueError(
                f"Row {missing.index(1)} has an image but no question: its recovery_attention_mask is all 0. Put a "
                f"question into the user turn or pass recovery_text= to the processor; {pictures.without_question}"
            )
        row_numbers, image_numbers = numbers[: len(row_sizes)], numbers[len(row_sizes) :]
        before, after = row_numbers or (0, 0)
        if known is not None:  # without newlines a tile is an image
            return _Read(known, known[0], known[2], before, after)
        return _Read(image_numbers[:3], image_numbers[3], image_numbers[4], before, after)

    def _layout(self, pixel_values: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, ImageLayout]:
        """Tiles (T, 3, H, W) of all pictures, and the placeholders that stand for their patches."""
        rows, columns = self._grid(pixel_values)
        return pixel_values, ImageLayout.of_grids(len(pixel_values), rows * columns)

    def _feature_layer(self, inputs: dict[str, Any]) -> int:
        """The hidden state that the projector reads; takes a call's own choice out of its inputs."""
        layer, strategy = (inputs.pop(f"vision_feature_{name}", None) for name in ("layer", "select_strategy"))
        check_feature_layer(self.config, layer, strategy)
        return self.config.vision_feature_layer if layer is None else layer

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        patch = self.config.vision_config.patch_size
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def _section(self, overrides: Mapping[str, Any] | None) -> TokenRecoveryConfig:
        """The config's section with a call's overrides, checked against the model."""
        section = self.config.token_recovery.replace(overrides)
        if overrides is not None:
            if section.text_encoder_config != self.config.token_recovery.text_encoder_config:
                raise ValueError("token_recovery.text_encoder_config belongs to the weights; a call cannot change it.")
            check_supported(self.config, section)
        section.validate()
        return section

    def _reads_question(self, section: TokenRecoveryConfig) -> bool:
        return self.token_recovery is not None and get_method(section.method).reads_question(section)


def _pad_token_id(config: Any) -> int:
    for holder in (config, config.get_text_config()):
        if getattr(holder, "pad_token_id", None) is not None:
            return holder.pad_token_id
    return 0


__all__ = ["RecCompMixin"]
