"""vLLM's own LLaVA classes with token recovery."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.checks import check_finite
from ...core.counting import picture_tokens
from ...core.layout import ImageLayout
from ...core.methods.registry import reads_question
from ...core.modeling_llava_next import tiled_layout
from ...core.picture_tokens import Question, choose_tokens, window_mask
from ...core.questions import lengthened
from ...core.tensors import pack_rows
from ...core.text_encoder import TokenRecoveryModules
from ...core.vision import EncodedImages, needed_states, vision_states
from ...core.words import NO_WORD
from .budgets import Budget, budget_from_tensor, count_tokens, request_section
from .keys import KeyMapper, check_loaded
from .places import append_places, check_tables, place_tokens, prompt_positions
from .processing import (
    PLACEHOLDERS,
    LlavaNextRecCompInfo,
    LlavaNextRecCompMultiModalProcessor,
    LlavaRecCompInfo,
    LlavaRecCompMultiModalProcessor,
    RecoveryDummyInputsBuilder,
)
from .ranks import of_first_rank
from .settings import position_count
from .tower import clip_tower

TOWER_TILES = 8
"""Most tiles in one call of the vision tower: vLLM limits a step by kept tokens, which many images share."""


@dataclasses.dataclass
class _RequestImage:
    """An image of a request.

    Args:
        tiles: (T, 3, H, W).
        size: Width and height in pixels.
        budget: Budget or rule of the request.
        question: (W, L) ids and mask, and (M,) words; `None` where the question is not read.
    """

    tiles: Tensor
    size: tuple[int, int]
    budget: Budget
    question: tuple[Tensor, Tensor, Tensor] | None


class RecoveryModelMixin:
    """Token recovery for one of vLLM's LLaVA classes, which must be the next base class."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any
    language_model: Any
    hf_to_vllm_mapper: KeyMapper
    token_recovery: TokenRecoveryModules | None
    supports_tower_connector_lora = False  # vLLM would map adapters by the uncompressed number of tokens
    supports_mrope = supports_multimodal_pruning = True  # asked for a checkpoint with original positions alone
    supports_encoder_tp_data = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the stock model with all blocks of its vision tower, and CLIP's text encoder."""
        enabled = vllm_config.model_config.hf_config.token_recovery.enabled and _has_tower(vllm_config)
        self._keeps_places = vllm_config.model_config.uses_mrope
        with _position_limit(vllm_config.model_config, self._keeps_places) as positions:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if self._keeps_places:
            check_tables(self.language_model, positions)
        self.token_recovery = None
        if not enabled:
            return
        # Stock vLLM stops at LLaVA's feature layer; saliency and relevance may read the last block too.
        self.vision_tower = CLIPVisionModel(
            self.config.vision_config,
            quant_config=vllm_config.quant_config,
            require_post_norm=True,
            prefix=maybe_prefix(prefix, "vision_tower"),
        )
        if (text := self.config.token_recovery.text_encoder_config) is not None:
            self.token_recovery = TokenRecoveryModules(CLIPTextConfig(**text), self.config.vision_config.hidden_size)
            self.token_recovery.requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint written by transformers 4 or 5.

        Raises:
            ValueError: Weights are missing, quantised ones included.
        """
        skipped = ["token_recovery."] if self.token_recovery is None else None
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=skipped)
        loaded = loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)
        check_loaded(self, loaded)
        return loaded

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The tokens of every image, each (K, D), in the order of the images."""
        embeds = kwargs.get("image_embeds")
        if embeds is not None:
            return list(embeds)  # their lengths may differ, unlike in the stock class
        if not self.config.token_recovery.enabled:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if kwargs.get("pixel_values") is None:
            return []
        images = self._images(**kwargs)
        outputs: list[Tensor] = [torch.empty(0)] * len(images)
        for batch in _batches(images):
            for index, tokens in zip(batch, self._compress([images[at] for at in batch]), strict=True):
                outputs[index] = tokens
        return outputs

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt before its images are encoded, see `prompt_positions`."""
        images = [
            (image.mm_position.offset, image.mm_position.length, int(image.data[PLACEHOLDERS].data))
            for image in sorted(mm_features, key=lambda image: image.mm_position.offset)
        ]
        return prompt_positions(len(input_tokens), images)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Positions of a prompt whose next images are encoded, see `place_tokens`."""
        return place_tokens(mrope_positions, multimodal_embeddings, num_computed_tokens)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the stock method; of three rows of positions the language model reads the first."""
        row = positions[0] if self._keeps_places else positions
        return super().forward(input_ids, row, *args, **kwargs)  # type: ignore[misc]

    def _images(
        self,
        pixel_values: Any,
        recovery_budget: Any,
        recovery_input_ids: Any = None,
        recovery_attention_mask: Any = None,
        recovery_words: Any = None,
        **kwargs: Any,
    ) -> list[_RequestImage]:
        """The images of a batch of requests; tensors of different shapes arrive as lists."""
        questions: list[Any] = [None] * len(recovery_budget)
        if recovery_input_ids is not None:
            questions = list(zip(recovery_input_ids, recovery_attention_mask, recovery_words, strict=True))
        tiles = self._tiles(pixel_values, **kwargs)
        return [
            _RequestImage(*image, budget_from_tensor(budget), question)
            for image, budget, question in zip(tiles, recovery_budget, questions, strict=True)
        ]

    def _tiles(self, pixel_values: Tensor, **kwargs: Any) -> list[tuple[Tensor, tuple[int, int]]]:
        """Tiles and size of every image."""
        size = (self.config.vision_config.image_size,) * 2
        return [(tile, size) for tile in pixel_values.unsqueeze(1)]

    def _layout(self, tiles: Tensor, images: list[_RequestImage]) -> ImageLayout:
        """The patch that each placeholder of the uncompressed images stands for."""
        return ImageLayout.of_grids(len(tiles), self._side**2)

    @property
    def _side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def _compress(self, images: list[_RequestImage]) -> Iterable[Tensor]:
        """The tokens (K, D) of images with one budget, computed as in the transformers models."""
        config, budget = self.config, images[0].budget
        section, layer = request_section(config.token_recovery, budget), config.vision_feature_layer
        tower, tiles = clip_tower(self.vision_tower.vision_model), torch.cat([image.tiles for image in images])
        asked = images[0].question is not None and reads_question(section)
        states = vision_states(tower, tiles, needed_states(section, layer, len(tower.encoder.layers), asked))
        layout = self._layout(tiles, images)
        choice = choose_tokens(
            tower,
            self.token_recovery,
            EncodedImages(states, layout, (self._side, self._side)),
            _question(images, layout.image_of_tile(tiles)) if asked else None,
            section,
            layer,
            num_heads=config.vision_config.num_attention_heads,
            projector=self._project,
            embedding=self._embed,
        )
        choice.sync()
        check_finite(choice.non_finite.tolist(), layout.tiles)
        expected = [count_tokens(config, budget, image.size) for image in images]
        if choice.image_lengths != expected:
            raise RuntimeError(f"Method {section.method!r} gave {choice.image_lengths} tokens, the budget {expected}.")
        tokens = choice.tokens(self._project, getattr(self, "image_newline", None))
        packed = tokens.packed()
        if self._keeps_places:
            places = pack_rows(tokens.places.unsqueeze(-1), tokens.lengths, sum(expected))
            packed = append_places(packed, places[:, 0].to(packed.device))
        return of_first_rank(packed).split(expected)

    def _embed(self, words: Tensor) -> Tensor:
        """The language model's input embeddings of tokens."""
        return self.language_model.embed_input_ids(words)

    def _project(self, features: Tensor) -> Tensor:
        """The projection of the features that rank 0 has; each rank holds a part of the projector."""
        return self.multi_modal_projector(of_first_rank(features))


@MULTIMODAL_REGISTRY.register_processor(
    LlavaRecCompMultiModalProcessor, info=LlavaRecCompInfo, dummy_inputs=RecoveryDummyInputsBuilder
)
class LlavaRecCompForConditionalGeneration(RecoveryModelMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5 with token recovery."""

    hf_to_vllm_mapper = KeyMapper.of(LlavaForConditionalGeneration.hf_to_vllm_mapper)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextRecCompMultiModalProcessor, info=LlavaNextRecCompInfo, dummy_inputs=RecoveryDummyInputsBuilder
)
class LlavaNextRecCompForConditionalGeneration(RecoveryModelMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with token recovery."""

    hf_to_vllm_mapper = KeyMapper.of(LlavaNextForConditionalGeneration.hf_to_vllm_mapper)

    def _tiles(
        self, pixel_values: Any, image_sizes: Any = None, **kwargs: Any
    ) -> list[tuple[Tensor, tuple[int, int]]]:
        """Tiles and size of every image, without the tiles that the processor appends as padding."""
        sizes = [(width, height) for height, width in (size.tolist() for size in image_sizes)]
        return [
            (tiles[: picture_tokens(self.config, size)[0]], size)
            for tiles, size in zip(pixel_values, sizes, strict=True)
        ]

    def _layout(self, tiles: Tensor, images: list[_RequestImage]) -> ImageLayout:
        """The patch that each placeholder of the uncompressed images stands for, as stock LLaVA-NeXT packs them."""
        sizes = [[image.size[1], image.size[0]] for image in images]
        return tiled_layout(self.config, tiles, sizes)[1]


@contextlib.contextmanager
def _position_limit(config: ModelConfig, keeps_places: bool) -> Iterator[int]:
    """Have tables of rotary embeddings built for positions of uncompressed prompts; yields their number."""
    text, positions = config.hf_text_config, position_count(config)
    own = text.max_position_embeddings
    if keeps_places:
        text.max_position_embeddings = positions
    try:
        yield positions
    finally:
        text.max_position_embeddings = own


def _has_tower(vllm_config: VllmConfig) -> bool:
    """Whether requests may contain images; otherwise vLLM builds no vision tower."""
    return vllm_config.model_config.get_multimodal_config().get_limit_per_prompt("image") > 0


def _batches(images: list[_RequestImage]) -> Iterator[list[int]]:
    """Indices of images with one budget that go through the vision tower together."""
    by_budget: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        by_budget.setdefault(repr(image.budget), []).append(index)  # 1 token is not the share 1.0
    for indices in by_budget.values():
        batch: list[int] = []
        for index in indices:
            if batch and sum(len(images[at].tiles) for at in (*batch, index)) > TOWER_TILES:
                yield batch
                batch = []
            batch.append(index)
        yield batch


def _question(images: list[_RequestImage], rows: Tensor) -> Question:
    """The questions of the images, padded to the number of windows and the length of the longest one."""
    given = [image.question for image in images if image.question is not None]
    length = max(mask.shape[-1] for _, mask, _ in given)
    alike = [
        (lengthened(ids, length), torch.nn.functional.pad(mask, (0, length - mask.shape[-1])), words)
        for ids, mask, words in given
    ]
    ids, mask, words = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_value=padding)
        for part, padding in zip(zip(*alike, strict=True), (0, 0, NO_WORD), strict=True)
    )
    return Question(ids, window_mask(ids, mask), rows, words)


__all__ = ["LlavaNextRecCompForConditionalGeneration", "LlavaRecCompForConditionalGeneration"]
