"""What the compressed LLaVA models share: from pictures and prompts to a short sequence, and generation on it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from . import compat, splicing
from .configuration_reccomp import TokenRecoveryConfig
from .recovery import (
    TokenRecoveryOutput,
    TokenSelection,
    VisualFeatures,
    assemble_tokens,
    check_features,
    get_method,
    select_tokens,
)
from .relevance import class_query_and_keys, patch_embeddings, text_similarity

RECOVERY_INPUTS = ("recovery_input_ids", "recovery_attention_mask")


class TokenRecoveryModules(nn.Module):
    """CLIP's text encoder and visual projection, frozen, which say how a question relates to a patch.

    `named_modules` stops here: adapters and quantisers look for their targets by module name, and these weights are
    none (`target_modules="q_proj"` or `"all-linear"` would otherwise reach the text encoder).
    """

    def __init__(self, text_config: CLIPTextConfig, vision_width: int) -> None:
        """Build both modules from a CLIP text config; the projection maps `vision_width` to its projection width."""
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(text_config)
        self.visual_projection = nn.Linear(vision_width, text_config.projection_dim, bias=False)
        self.requires_grad_(False)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module alone."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that `named_modules` does not show, with their names."""
        yield from self.named_children()

    def embed_question(self, input_ids: Tensor) -> Tensor:
        """Embeddings pooled at the end-of-text token: (rows, windows, length) int64 -> (rows, windows, P).

        The text encoder is causal, so padding after the end-of-text token needs no mask.
        """
        rows, windows, length = input_ids.shape
        embeds = self.text_encoder(input_ids=input_ids.reshape(rows * windows, length)).text_embeds
        return embeds.reshape(rows, windows, -1)


@dataclasses.dataclass
class _Pictures:
    """What a batch's pictures, prompts and questions come to before anything is read from the device."""

    features: VisualFeatures
    selection: TokenSelection
    placeholders: splicing.PlaceholderMap
    lengths: list[int]
    missing_question: Tensor  # (R,) bool


class RecCompMixin:
    """Token recovery for a stock LLaVA class, which stands next in the bases."""

    # What the stock class brings along.
    config: Any
    model: Any
    post_init: Any
    get_input_embeddings: Any
    _modules: dict[str, Any]
    token_recovery: TokenRecoveryModules | None

    def __init__(self, config: Any) -> None:
        """Build the stock model, then the recovery modules if the config names a text encoder.

        Raises:
            ValueError: A vision tower or feature selection that has no class token to go by.
        """
        _check_supported(config, config.token_recovery)
        super().__init__(config)  # type: ignore[call-arg]
        self.token_recovery = _build_recovery_modules(config)
        self._llava.vision_tower.requires_grad_(False)
        self.post_init()

    @property
    def _llava(self) -> Any:
        """The stock module that holds vision tower, projector and language model."""
        return self if "vision_tower" in self._modules else self.model

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the stock method, but weights that are missing from the checkpoint raise instead of being random.

        Raises:
            ValueError: The checkpoint lacks weights that the config asks for.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of {cls.__name__}, which would be random: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. A stock LLaVA becomes a checkpoint "
                "of this class by reccomp_hf.convert(llava, clip, output)."
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """Read vision towers that transformers 5.x wrote on 4.57 too."""
        renamed = compat.rename_vision_key(key)
        return renamed, renamed != key

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, the frozen recovery modules' included."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        if recurse and self.token_recovery is not None:
            for name, module in self.token_recovery.parts():
                path = ".".join(filter(None, (prefix, "token_recovery", name)))
                yield from module.named_parameters(path, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """All buffers, the frozen recovery modules' included."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        if recurse and self.token_recovery is not None:
            for name, module in self.token_recovery.parts():
                path = ".".join(filter(None, (prefix, "token_recovery", name)))
                yield from module.named_buffers(path, recurse, remove_duplicate)

    @torch.no_grad()
    def recover(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[TokenRecoveryOutput]:
        """Which tokens stand for each picture, and why; nothing is given to the language model.

        Args:
            input_ids: (R, L) int64 prompts with their image placeholders.
            pixel_values: (I, 3, H, W) pictures of all rows in reading order.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            token_recovery: Fields of the config section to override for this call.
            **kwargs: Other outputs of the processor; not used.

        Returns:
            One [`TokenRecoveryOutput`] per picture, each with B = 1.

        Raises:
            ValueError: Placeholders, pictures or questions that do not fit.
        """
        section = self._section(token_recovery)
        pictures = self._look(input_ids, pixel_values, recovery_input_ids, recovery_attention_mask, section, None)
        sizes, _ = self._read(pictures, None)
        return assemble_tokens(pictures.features, pictures.selection, section, sizes).split()

    def compress_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        recovery_input_ids: Tensor | None = None,
        recovery_attention_mask: Tensor | None = None,
        token_recovery: Mapping[str, Any] | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], TokenRecoveryOutput | None]:
        """Shorten a batch: pictures become their recovered tokens, and the prompts are cut to match.

        Args:
            input_ids: (R, L) int64 with the image placeholders of every picture.
            attention_mask: (R, L), 0 for padding; `None` for no padding.
            position_ids: (R, L) int64 positions of the uncut sequence, `None` for the usual ones.
            labels: (R, L) int64, cut with the prompt.
            pixel_values: (I, 3, H, W) pictures of all rows in reading order.
            recovery_input_ids: (R, W, T) int64, the questions as the text encoder's tokens.
            recovery_attention_mask: (R, W, T), 0 for padding.
            token_recovery: Fields of the config section to override for this call.
            vision_feature_layer: As in stock LLaVA, an int.
            vision_feature_select_strategy: As in stock LLaVA, `"default"`.
            **kwargs: Passed through.

        Returns:
            The shortened inputs (`input_ids`, `inputs_embeds`, `attention_mask`, and `labels` and `position_ids`
            where they apply), which `forward` and `generate` take, and the [`TokenRecoveryOutput`] of all pictures.
            Without pictures, or with `enabled: false`, the inputs come back as they are, and `None`.

        Raises:
            ValueError: Placeholders, pictures or questions that do not fit.
        """
        section = self._section(token_recovery)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"labels": labels, "pixel_values": pixel_values, **kwargs}
        if pixel_values is None or not section.enabled:
            return {name: value for name, value in inputs.items() if value is not None}, None
        shortened, record, _ = self._compress(
            inputs, recovery_input_ids, recovery_attention_mask, section, vision_feature_layer,
            vision_feature_select_strategy,
        )  # fmt: skip
        return shortened, record

    def _compress(
        self,
        inputs: dict[str, Any],
        recovery_input_ids: Tensor | None,
        recovery_attention_mask: Tensor | None,
        section: TokenRecoveryConfig,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> tuple[dict[str, Any], TokenRecoveryOutput, Tensor]:
        """`compress_inputs` once there is something to compress; also the projected features (tokens, D)."""
        input_ids, labels, position_ids = (inputs.pop(name, None) for name in ("input_ids", "labels", "position_ids"))
        attention_mask, pixel_values = inputs.pop("attention_mask", None), inputs.pop("pixel_values")
        self._check_call(input_ids, attention_mask, inputs, section)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        _check_feature_layer(self.config, vision_feature_layer, vision_feature_select_strategy)
        pictures = self._look(
            input_ids, pixel_values, recovery_input_ids, recovery_attention_mask, section, vision_feature_layer
        )
        splice = splicing.plan_splice(pictures.placeholders, attention_mask, pictures.selection.counts)
        sizes, (before, after) = self._read(pictures, splice.sizes)
        # Padding that every row has stays, so that cutting nothing changes nothing.
        source = splice.source(input_ids.shape[1] - before + after)
        record = assemble_tokens(pictures.features, pictures.selection, section, sizes)
        features = self._llava.multi_modal_projector(_pack(record, sizes[2]))
        new_ids = splicing.cut(input_ids, source, _pad_token_id(self.config))
        embeds = self.get_input_embeddings()(new_ids)
        features = features.to(embeds.device, embeds.dtype)
        is_image = splicing.cut(pictures.placeholders.is_placeholder, source, 0).unsqueeze(-1)
        shortened = {
            **inputs,
            "input_ids": new_ids,
            "inputs_embeds": embeds.masked_scatter(is_image, features),
            "attention_mask": splicing.cut(attention_mask, source, 0),
        }
        if labels is not None:
            shortened["labels"] = splicing.cut(labels, source, -100)
        if section.position_ids == "original":
            shortened["position_ids"] = splicing.original_positions(
                position_ids, pictures.placeholders, record.places, source
            )
        elif position_ids is not None:
            shortened["position_ids"] = splicing.compact_positions(position_ids, splice, source)
        return shortened, record, features

    def _compressed_forward(
        self,
        inputs: dict[str, Any],
        recovery_input_ids: Tensor | None,
        recovery_attention_mask: Tensor | None,
        token_recovery: Mapping[str, Any] | None,
        output_class: type,
    ) -> Any:
        """The stock `forward` on the shortened inputs, its output with the counts."""
        section = self._section(token_recovery)
        stock = super().forward  # type: ignore[misc]
        if inputs["pixel_values"] is None or not section.enabled:
            if inputs["inputs_embeds"] is not None and inputs["pixel_values"] is None:
                inputs["input_ids"] = None  # what compress_inputs returns holds both
            return stock(**inputs)
        vision = [inputs.pop(name, None) for name in ("vision_feature_layer", "vision_feature_select_strategy")]
        shortened, record, features = self._compress(
            inputs, recovery_input_ids, recovery_attention_mask, section, *vision
        )
        output = stock(**{**shortened, "input_ids": None})
        if not isinstance(output, Mapping):
            return output
        return output_class(**{**output, "image_hidden_states": features, "visual_token_counts": record.counts})

    def _look(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        recovery_input_ids: Tensor | None,
        recovery_attention_mask: Tensor | None,
        section: TokenRecoveryConfig,
        vision_feature_layer: int | None,
    ) -> _Pictures:
        """Run the vision tower and choose tokens; nothing is read from the device."""
        self._check_question(recovery_input_ids, input_ids, section)
        rows, columns = self._grid(pixel_values)
        lengths = [rows * columns] * pixel_values.shape[0]
        placeholders = splicing.map_placeholders(
            input_ids == self.config.image_token_id, torch.tensor(lengths, device=input_ids.device)
        )
        states = self._vision_states(pixel_values)
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        missing = torch.zeros_like(placeholders.per_row, dtype=torch.bool)
        with torch.no_grad():
            tower = compat.clip_vision_model(self._llava.vision_tower)
            block = section.visual_layer % len(tower.encoder.layers)
            query, keys = class_query_and_keys(tower.encoder.layers[block], states[block])
            similarity = None
            if recovery_input_ids is not None and self._reads_question(section):
                windows = _windows(recovery_input_ids, recovery_attention_mask)
                missing = (placeholders.per_row > 0) & ~windows.any(-1)
                similarity = self._text_similarity(states, recovery_input_ids, windows, placeholders.row, section)
        features = check_features(
            states[layer][:, 1:],
            query,
            keys,
            similarity,
            section,
            num_heads=self.config.vision_config.num_attention_heads,
            grid=(rows, columns),
        )
        return _Pictures(features, select_tokens(features, section), placeholders, lengths, missing)

    def _read(self, pictures: _Pictures, lengths: Tensor | None) -> tuple[list[int], list[int]]:
        """The one read from the device: validate, and return the selection's sizes and the row lengths."""
        known, per_row = pictures.selection.known_sizes, pictures.placeholders.per_row
        wanted = [per_row, pictures.missing_question.long()]
        wanted += [] if lengths is None else [lengths]
        wanted += [pictures.selection.sizes] if known is None else []
        values = iter(torch.cat([value.to(per_row.device) for value in wanted]).tolist())
        rows = len(per_row)
        splicing.check_placeholders(list(itertools.islice(values, rows)), pictures.lengths)
        missing = list(itertools.islice(values, rows))
        if any(missing):
            raise ValueError(
                f"Row {missing.index(1)} has an image but no question: its recovery_attention_mask is all 0. Put a "
                "question into the user turn, pass recovery_text= to the processor, or set text_share 0 and a budget."
            )
        read = list(itertools.islice(values, 0 if lengths is None else len(lengths)))
        return known or list(values), read

    def _vision_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """All hidden states of the vision tower, each (I, N + 1, C); no graph is built for a frozen tower."""
        tower = self._llava.vision_tower
        frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            return tower(pixel_values, output_hidden_states=True).hidden_states

    def _text_similarity(
        self,
        states: tuple[Tensor, ...],
        recovery_input_ids: Tensor,
        windows: Tensor,
        rows: Tensor,
        section: TokenRecoveryConfig,
    ) -> Tensor:
        """(I, N) similarity of every picture's patches with the question of its row."""
        tower, modules = compat.clip_vision_model(self._llava.vision_tower), self.token_recovery
        if modules is None:
            raise ValueError("This checkpoint is visual-only: token_recovery.text_encoder_config is null.")
        projection = modules.visual_projection
        patches = patch_embeddings(
            section.text_relevance, states[-2], states[-1], tower.encoder.layers[-1], tower.post_layernorm, projection
        )
        text = modules.embed_question(recovery_input_ids).to(patches.device)
        rows = rows.to(patches.device)
        similarity = text_similarity(patches, text[rows], windows.to(rows.device)[rows], section.text_relevance_sign)
        scale = projection.out_features**0.5 if get_method(section.method).scales_similarity else 1
        return similarity / scale

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        patch = self.config.vision_config.patch_size
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def _section(self, overrides: Mapping[str, Any] | None) -> TokenRecoveryConfig:
        """The config's section with a call's overrides, checked against the model."""
        section = self.config.token_recovery.replace(overrides)
        if overrides is not None:
            if section.text_encoder_config != self.config.token_recovery.text_encoder_config:
                raise ValueError("token_recovery.text_encoder_config belongs to the weights; a call cannot change it.")
            _check_supported(self.config, section)
        section.validate()
        return section

    def _reads_question(self, section: TokenRecoveryConfig) -> bool:
        return self.token_recovery is not None and (section.budget is None or section.text_share > 0)

    def _check_question(
        self, recovery_input_ids: Tensor | None, input_ids: Tensor, section: TokenRecoveryConfig
    ) -> None:
        if not self._reads_question(section):
            return
        if recovery_input_ids is None:
            raise ValueError(
                "Text recovery needs the question: recovery_input_ids is None. The processor of this checkpoint "
                "writes it (AutoProcessor.from_pretrained); a visual-only call sets token_recovery={'text_share': 0} "
                "and a budget."
            )
        if recovery_input_ids.ndim != 3 or recovery_input_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"recovery_input_ids must have shape (rows, windows, length) with {input_ids.shape[0]} rows, got "
                f"{tuple(recovery_input_ids.shape)}."
            )

    def _check_call(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        others: Mapping[str, Any],
        section: TokenRecoveryConfig,
    ) -> None:
        if input_ids is None or others.get("inputs_embeds") is not None:
            raise ValueError("Pictures need input_ids with their placeholders, and no inputs_embeds beside them.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)} beside pictures, got "
                f"{tuple(attention_mask.shape)}."
            )
        if cache_length(others.get("past_key_values")):
            raise ValueError(
                "Pictures with a non-empty past_key_values: the cache holds the shortened prompt, so full-length "
                "input_ids do not fit it. Pass only the new turn's ids without pictures, or start with an empty cache."
            )
        attention = getattr(self.config.get_text_config(), "_attn_implementation", None) or ""
        if section.position_ids == "original" and attention.startswith("flash"):
            raise ValueError(
                f"position_ids 'original' leaves gaps, which {attention} takes for packed sequences: load the model "
                "with attn_implementation='sdpa' or set position_ids to 'compact'."
            )


def _build_recovery_modules(config: Any) -> TokenRecoveryModules | None:
    section = config.token_recovery.text_encoder_config
    if section is None:
        return None
    return TokenRecoveryModules(CLIPTextConfig(**section), config.vision_config.hidden_size)


def _check_supported(config: Any, section: TokenRecoveryConfig) -> None:
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"Token recovery goes by CLIP's class token; the vision tower is {vision.model_type!r}, which is not "
            "supported. Use a LLaVA with a CLIP vision tower ('clip_vision_model')."
        )
    _check_feature_layer(config, None, None)
    if -section.visual_layer > vision.num_hidden_layers:
        raise ValueError(
            f"token_recovery.visual_layer is {section.visual_layer}, but the vision tower has only "
            f"{vision.num_hidden_layers} blocks."
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    if isinstance(section.budget, int) and section.budget > patches:
        raise ValueError(
            f"token_recovery.budget is {section.budget}, but an image has only {patches} patches; write an int up "
            f"to {patches} or a share in (0, 1]."
        )
    get_method(section.method)


def _check_feature_layer(config: Any, layer: int | None, strategy: str | None) -> None:
    layer = config.vision_feature_layer if layer is None else layer
    strategy = config.vision_feature_select_strategy if strategy is None else strategy
    blocks = config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -blocks - 1 <= layer <= blocks or layer % (blocks + 1) == blocks:
        raise ValueError(
            f"vision_feature_layer must be one int below the last of the {blocks} blocks (LLaVA's is -2), "
            f"got {layer!r}."
        )
    if strategy != "default":
        raise ValueError(f"vision_feature_select_strategy must be 'default' (no class token), got {strategy!r}.")


def _pack(record: TokenRecoveryOutput, total: int) -> Tensor:
    """The `total` tokens of all images without padding: (total, C)."""
    images, width = record.tokens.shape[:2]
    if images * width == total:
        return record.tokens.flatten(0, 1)
    counts = record.counts
    image = torch.arange(images, device=counts.device).repeat_interleave(counts, output_size=total)
    slot = torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[image]
    return record.tokens[image, slot]


def _windows(recovery_input_ids: Tensor, recovery_attention_mask: Tensor | None) -> Tensor:
    """(rows, windows) bool: windows that hold text."""
    if recovery_attention_mask is None:
        return torch.ones_like(recovery_input_ids[..., 0], dtype=torch.bool)
    return (recovery_attention_mask != 0).any(-1)


def _pad_token_id(config: Any) -> int:
    for holder in (config, config.get_text_config()):
        if getattr(holder, "pad_token_id", None) is not None:
            return holder.pad_token_id
    return 0


def cache_length(cache: Any) -> int:
    """Tokens in a cache; `None` is an empty one."""
    return 0 if cache is None else int(cache.get_seq_length())


__all__ = ["RecCompMixin", "TokenRecoveryModules", "cache_length"]
