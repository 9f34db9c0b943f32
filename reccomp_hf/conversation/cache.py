"""The key-value cache of a conversation, with the ids and the visual tokens that its entries stand for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from ..core.checks import cache_length
from ..core.features import TokenRecoveryOutput
from ..core.layout import NEWLINE, ImageLayout


@dataclasses.dataclass
class VisualToken:
    """A visual token of a conversation.

    Attributes:
        image: Number of the image in the conversation, from 0.
        place: Index of its placeholder among the image's placeholders in the uncut prompt; -1 for a merged token.
        row: Row of the image that the placeholder belongs to; -1 for a merged token.
        kind: `"patch"`, `"newline"` or `"merged"`.
        turn: The last question that chose it, from 0.
        entry: Index of its entry in the cache.
    """

    image: int
    place: int
    row: int
    kind: str
    turn: int
    entry: int = -1


class ConversationCache:
    """A `DynamicCache` of one sequence, with an account of its entries.

    Attributes:
        key_values: The cache that `generate` takes.
        ids: Ids of the uncut conversation that the cache stands for, with all placeholders of its images.
        prompt_length: Number of ids up to the end of the last question; the others are the answer's.
        visual: The visual tokens.
    """

    def __init__(self) -> None:
        self.key_values = DynamicCache()
        self.ids: list[int] = []
        self.prompt_length = 0
        self.visual: list[VisualToken] = []

    def __len__(self) -> int:
        return cache_length(self.key_values)

    def rewind(self, ids: Sequence[int]) -> int:
        """Drop the end of the last answer from where the conversation now has other ids.

        Args:
            ids: Ids of the whole conversation with its next question.

        Returns:
            The number of leading ids that the cache holds.

        Raises:
            ValueError: The ids differ before the answer.
        """
        pairs = enumerate(zip(self.ids, ids, strict=False))
        same = next((place for place, (cached, new) in pairs if cached != new), min(len(self.ids), len(ids)))
        if same < self.prompt_length:
            raise ValueError(
                f"The chat template now writes an earlier turn differently, from token {same} of the conversation, so "
                "the cache no longer matches it: use mode='rebuild'."
            )
        self.drop_end(len(self.ids) - same)
        self.ids = self.ids[:same]
        return same

    def drop_end(self, entries: int) -> None:
        """Remove entries from the end."""
        if entries > 0:
            self.key_values.crop(-entries)

    def record(self, ids: list[int], prompt_length: int, visual: Sequence[VisualToken]) -> None:
        """Record the ids that the cache now stands for, and its new visual tokens."""
        self.ids, self.prompt_length = ids, prompt_length
        self.visual += visual

    def refresh(self, chosen: Sequence[VisualToken], turn: int) -> list[VisualToken]:
        """Mark the patches and newlines of a choice that the cache holds as chosen again.

        Returns:
            The patches and newlines that the cache does not hold.
        """
        cached = {(token.image, token.place): token for token in self.visual if token.kind != "merged"}
        missing = []
        for token in chosen:
            same = cached.get((token.image, token.place))
            if same is not None:
                same.turn = turn
            elif token.kind != "merged":
                missing.append(token)
        return missing

    def make_room(self, new: Sequence[VisualToken], most: int, turn: int) -> None:
        """Remove the tokens that were not chosen for the longest time, until the new ones fit.

        Patches leave by the last question that chose them, oldest first, then in the order of the cache; a newline
        leaves with the last patch of its row; merged tokens, which stand for a whole region, leave last.

        Raises:
            ValueError: The choice for this question alone has more tokens than `most`.
        """
        chosen = sum(token.turn == turn for token in self.visual) + len(new)
        if chosen > most:
            raise ValueError(
                f"max_visual_tokens is {most}, but the choice for this question has {chosen} visual tokens, newlines "
                f"included: raise it to at least {chosen}, or set a lower token_recovery budget."
            )
        patches = Counter((token.image, token.row) for token in [*self.visual, *new] if token.kind == "patch")
        newlines = {(token.image, token.row): token for token in self.visual if token.kind == "newline"}
        old = [token for token in self.visual if token.turn < turn and token.kind != "newline"]
        old.sort(key=lambda token: (token.kind == "merged", token.turn, token.entry), reverse=True)
        leaving: list[VisualToken] = []
        while old and len(self.visual) + len(new) - len(leaving) > most:
            token = old.pop()
            leaving.append(token)
            row = (token.image, token.row)
            patches[row] -= token.kind == "patch"
            if token.kind == "patch" and not patches[row] and row in newlines:
                leaving.append(newlines[row])
        self._remove(leaving)

    def _remove(self, leaving: Sequence[VisualToken]) -> None:
        """Delete entries; the others keep their positions."""
        if not leaving:
            return
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[[token.entry for token in leaving]] = False
        for layer in self.key_values.layers:
            index = stays.nonzero().flatten().to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(-2, index), layer.values.index_select(-2, index)
        entries = (stays.cumsum(0) - 1).tolist()
        self.visual = [token for token in self.visual if stays[token.entry]]
        for token in self.visual:
            token.entry = entries[token.entry]


def visual_tokens(layout: ImageLayout, record: TokenRecoveryOutput, first: int, turn: int) -> list[VisualToken]:
    """The tokens of a layout's images in the order in which they enter the prompt.

    Args:
        layout: The placeholders of the images.
        record: The record of the choice for all of them.
        first: Number of the first image in the conversation.
        turn: The question that the tokens were chosen for.
    """
    kept = record.kept_mask
    layout = layout.to(kept.device)
    patches, newlines = layout.kept(kept)
    counts, _ = layout.counts(kept, record.merged_counts)
    merged, tokens = (counts - patches.sum(-1)).tolist(), []
    for index, (places, rows) in enumerate(zip((patches | newlines).cpu(), layout.rows.tolist(), strict=True)):
        slots = layout.slots[index].tolist()
        for place in places.nonzero().flatten().tolist():
            kind = "newline" if slots[place] == NEWLINE else "patch"
            tokens.append(VisualToken(first + index, place, rows[place], kind, turn))
        tokens += [VisualToken(first + index, -1, -1, "merged", turn) for _ in range(merged[index])]
    return tokens


__all__ = ["ConversationCache", "VisualToken", "visual_tokens"]
