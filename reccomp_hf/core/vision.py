"""Running CLIP's vision tower: the hidden states that the choice of tokens reads, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compat import run_block
from .layout import PADDING, ImageLayout
from .methods.registry import get_method, reads_encoded_question
from .relevance import relevance_state
from .settings import Settings
from .tensor_checks import check_tensor


@dataclasses.dataclass
class EncodedImages:
    """Encoded images, which take the place of `pixel_values` in later calls about the same images.

    Args:
        states: Hidden states (T, N + 1, C) of all tiles by index: 0 is the first block's input, the number of blocks
            is the last block's output. Only those that the config section reads.
        layout: The patch that each placeholder stands for.
        grid: (rows, columns) of a tile's patches.
    """

    states: dict[int, Tensor]
    layout: ImageLayout
    grid: tuple[int, int]


class StateIndices(NamedTuple):
    """Hidden states that a section reads, by index.

    Args:
        projector: The state that LLaVA's projector reads.
        saliency: The input of the block whose class attention is the saliency.
        objects: The input of the method's `object_block`; that of saliency if it has none.
        relevance: The state that is compared with the question.
    """

    projector: int
    saliency: int
    objects: int
    relevance: int


def concatenate(parts: Sequence[EncodedImages | None]) -> EncodedImages | None:
    """Images that were encoded at different times, as one batch; `None` if there are none."""
    given = [part for part in parts if part is not None]
    if len(given) < 2:
        return given[0] if given else None
    layouts, tiles = [part.layout for part in given], 0
    longest, slots, rows = max(layout.slots.shape[1] for layout in layouts), [], []
    for layout in layouts:
        padding = (0, longest - layout.slots.shape[1])
        shifted = torch.where(layout.slots < 0, layout.slots, layout.slots + tiles * layout.patches)
        slots.append(torch.nn.functional.pad(shifted, padding, value=PADDING))
        rows.append(torch.nn.functional.pad(layout.rows, padding))
        tiles += sum(layout.tiles)
    layout = dataclasses.replace(
        layouts[0],
        slots=torch.cat(slots),
        rows=torch.cat(rows),
        tiles=[size for layout in layouts for size in layout.tiles],
        lengths=[length for layout in layouts for length in layout.lengths],
        patch_counts=[count for layout in layouts for count in layout.patch_counts],
    )
    states = {index: torch.cat([part.states[index] for part in given]) for index in given[0].states}
    return dataclasses.replace(given[0], states=states, layout=layout)


def state_indices(settings: Settings, feature_layer: int, blocks: int) -> StateIndices:
    """The hidden states that settings read; index 0 is the first block's input, `blocks` the last block's output.

    Args:
        settings: The section.
        feature_layer: The hidden state that LLaVA's projector reads, negative if counted from the end.
        blocks: Number of blocks of the vision tower.

    Raises:
        ValueError: The tower lacks a block that the method reads.
    """
    relevance = relevance_state(settings.text_relevance, blocks)
    saliency, object_block = settings.visual_layer % blocks, get_method(settings.method).object_block
    objects = saliency if object_block is None else object_block(settings, blocks)
    return StateIndices(feature_layer % (blocks + 1), saliency, objects, relevance)


def needed_states(section: Settings, feature_layer: int, blocks: int, text: bool) -> set[int]:
    """The distinct indices of `state_indices` under a section's settings and all of its rules.

    That for the question is left out where settings do not read it as the text encoder gives it, or `text`, whether
    there is one, is false.
    """
    needed: set[int] = set()
    for settings in section.all_settings:
        indices = state_indices(settings, feature_layer, blocks)
        needed |= {indices.projector, indices.saliency, indices.objects}
        needed |= {indices.relevance} if text and reads_encoded_question(settings) else set()
    return needed


def vision_states(tower: Any, pixel_values: Tensor, needed: set[int]) -> dict[int, Tensor]:
    """Run a CLIP vision tower as far as needed; for LLaVA's features that is all but its last block.

    Args:
        tower: The module that holds `embeddings`, `pre_layrnorm` and `encoder`.
        pixel_values: (T, 3, H, W).
        needed: Indices of hidden states, see [`EncodedImages`].

    Returns:
        The hidden states (T, N + 1, C) by their index, equal to the stock ones.
    """
    states: dict[int, Tensor] = {}
    state = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for index, block in enumerate([*tower.encoder.layers, None]):
        if index in needed:
            states[index] = state
        if index >= max(needed):
            return states
        state = run_block(block, state)
    return states


def check_states(states: dict[int, Tensor], needed: set[int]) -> None:
    """Refuse images that were encoded for other settings.

    Raises:
        ValueError: A hidden state is missing.
    """
    if missing := needed - states.keys():
        raise ValueError(
            f"The images were encoded for other settings: hidden states {sorted(missing)} are missing, there are "
            f"{sorted(states)}. Pass encode_images the token_recovery of the calls that follow."
        )


def check_not_empty(pixel_values: Any, channels: int) -> None:
    """Refuse a batch of no images, and one that is not as a processor returns it.

    Raises:
        ValueError: `pixel_values` is not a tensor of numbers of at least 4 dimensions and `channels`, or has no
            rows.
    """
    is_tensor = isinstance(pixel_values, Tensor)
    if not is_tensor or pixel_values.ndim < 4 or pixel_values.shape[-3] != channels:
        shape = f" of shape {tuple(pixel_values.shape)}" if is_tensor else ""
        raise ValueError(
            f"pixel_values must be a tensor (images, ..., {channels}, height, width), got "
            f"{type(pixel_values).__name__}{shape}: call the processor with return_tensors='pt'."
        )
    check_tensor("pixel_values", pixel_values)
    if pixel_values.dtype == torch.bool:
        raise ValueError("pixel_values must be numbers, got torch.bool: pass them as the processor returns them.")
    if not len(pixel_values):
        raise ValueError(
            f"pixel_values hold no image, got shape {tuple(pixel_values.shape)}: leave pixel_values out of a call "
            "without images."
        )


def check_pixels(pixel_values: Any) -> None:
    """Refuse encoded images where the stock model would read them.

    Raises:
        ValueError: `pixel_values` is not a tensor.
    """
    if isinstance(pixel_values, EncodedImages):
        raise ValueError(
            "With token_recovery.enabled false the stock model reads pixel_values as a tensor, but got EncodedImages."
        )


__all__ = [
    "EncodedImages",
    "StateIndices",
    "check_not_empty",
    "check_pixels",
    "check_states",
    "concatenate",
    "needed_states",
    "state_indices",
    "vision_states",
]
