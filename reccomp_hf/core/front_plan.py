"""Plans: all that is known of a run of the front before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from .configuration import TokenRecoveryConfig
from .layout import ImageLayout
from .methods.registry import get_method
from .settings import fields_text
from .tensors import round_up

_STEP = {"placeholders": 256, "newlines": 32}
"""Images of LLaVA-NeXT with as many tiles share a computation: their numbers are rounded up to multiples of these."""


@dataclasses.dataclass(frozen=True)
class FrontPlan:
    """All that is known of a run of the front before it starts.

    Args:
        section: The settings.
        feature_layer: The hidden state that LLaVA's projector reads.
        layout: The placeholders of the images; a run takes its index tensors from its inputs.
        grid: (rows, columns) of a tile's patches.
        most_newlines: Bound of an image's newlines, where bounds take the place of sizes that depend on the choice;
            `None` without any.
        projects: Whether tokens are made of the choice, rather than the choice alone returned.
    """

    section: TokenRecoveryConfig
    feature_layer: int
    layout: ImageLayout
    grid: tuple[int, int]
    most_newlines: int | None = None
    projects: bool = True

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal keys and equal shapes of the inputs mean an equal computation."""
        section, layout = fields_text(self.section), self.layout
        shape = (tuple(layout.tiles), layout.has_newlines, self.grid, self.most_newlines)
        return (section, id(get_method(self.section.method)), self.feature_layer, *shape)

    def bounded(self) -> FrontPlan:
        """The plan for images of any size with as many tiles: it has bounds where sizes depend on the choice."""
        layout = self.layout
        if not layout.has_newlines:
            return self
        newlines = [length - count for length, count in zip(layout.lengths, layout.patch_counts, strict=True)]
        most = round_up(max(newlines), _STEP["newlines"]) if layout.keeps_newlines else 0
        layout = layout.padded(round_up(layout.slots.shape[1], _STEP["placeholders"]))
        return dataclasses.replace(self, layout=layout, most_newlines=most)


__all__ = ["FrontPlan"]
