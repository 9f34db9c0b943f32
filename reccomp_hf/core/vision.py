"""What CLIP's vision tower makes of pictures: the hidden states that the choice of tokens reads, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .compat import run_block
from .configuration import TokenRecoveryConfig
from .layout import PADDING, ImageLayout
from .relevance import relevance_state


@dataclasses.dataclass
class EncodedImages:
    """Pictures as the vision tower left them; it takes the place of `pixel_values` in later calls about them.

    Args:
        states: Hidden states (T, N + 1, C) of all tiles by their index: 0 is what the first block reads, the number
            of blocks what the last one gives. Only those that the config section reads.
        layout: Which placeholder stands for which patch.
        grid: (rows, columns) of a tile's patches.
    """

    states: dict[int, Tensor]
    layout: ImageLayout
    grid: tuple[int, int]


def together(parts: Sequence[EncodedImages | None]) -> EncodedImages | None:
    """Pictures that were encoded at different times as one."""
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
    )
    states = {index: torch.cat([part.states[index] for part in given]) for index in given[0].states}
    return dataclasses.replace(given[0], states=states, layout=layout)


def needed_states(section: TokenRecoveryConfig, feature_layer: int, blocks: int, text: bool) -> set[int]:
    """Indices of the hidden states that a section reads.

    Args:
        section: The settings.
        feature_layer: The hidden state that LLaVA's projector reads.
        blocks: Blocks of the vision tower.
        text: Whether the choice reads the question.
    """
    needed = {feature_layer % (blocks + 1), section.visual_layer % blocks}
    return needed | {relevance_state(section.text_relevance, blocks)} if text else needed


def vision_states(tower: Any, pixel_values: Tensor, needed: set[int]) -> dict[int, Tensor]:
    """Run a CLIP vision tower as far as it is needed; for LLaVA's features that is all but its last block.

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
    """Refuse pictures that were encoded for other settings.

    Raises:
        ValueError: A hidden state is missing.
    """
    if missing := needed - states.keys():
        raise ValueError(
            f"The pictures were encoded for other settings: hidden states {sorted(missing)} are missing, there are "
            f"{sorted(states)}. Pass encode_images the token_recovery of the calls that follow."
        )


def check_pixels(pixel_values: Any) -> None:
    """Refuse encoded pictures where the stock model would read them.

    Raises:
        ValueError: `pixel_values` is no tensor.
    """
    if isinstance(pixel_values, EncodedImages):
        raise ValueError(
            "With token_recovery.enabled false the stock model reads pixel_values as a tensor, but got EncodedImages."
        )


__all__ = ["EncodedImages", "check_pixels", "check_states", "needed_states", "together", "vision_states"]
