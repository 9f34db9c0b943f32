"""What a conversation's key-value cache holds: which ids it stands for, and which visual tokens."""

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
        image: Its picture, counted over the conversation.
        place: Which of the picture's placeholders in the uncut prompt it stands for; -1 for a merged one.
        row: Row of the picture that the placeholder belongs to; -1 for a merged one.
        kind: `"patch"`, `"newline"` or `"merged"`.
        turn: The last question whose choice has it, from 0.
        entry: Where it stands in the cache.
    """

    image: int
    place: int
    row: int
    kind: str
    turn: int
    entry: int = -1


class ConversationCache:
    """A `DynamicCache` of one sequence, and what its entries are.

    Attributes:
        cache: What `generate` takes as `cache`.
        ids: Ids of the uncut conversation that the cache stands for, all placeholders of its pictures among them.
        prompt: How many of them were read up to the last question; the rest is of the answer.
        visual: The visual tokens.
    """

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.ids: list[int] = []
        self.prompt = 0
        self.visual: list[VisualToken] = []

    def __len__(self) -> int:
        return cache_length(self.cache)

    def go_back(self, ids: Sequence[int]) -> int:
        """Forget the end of the last answer as far as the conversation, written anew, has other ids there.

        Args:
            ids: Of the whole conversation with its next question.

        Returns:
            How many of the ids the cache holds.

        Raises:
            ValueError: What differs stands before the answer.
        """
        pairs = enumerate(zip(self.ids, ids, strict=False))
        same = next((place for place, (held, new) in pairs if held != new), min(len(self.ids), len(ids)))
        if same < self.prompt:
            raise ValueError(
                f"The chat template now writes an earlier turn otherwise, from its token {same} on, so that the cache "
                "does not fit the conversation any more: use mode='rebuild'."
            )
        self.drop_end(len(self.ids) - same)
        self.ids = self.ids[:same]
        return same

    def drop_end(self, entries: int) -> None:
        """Take so many entries off the end."""
        if entries > 0:
            self.cache.crop(-entries)

    def take(self, ids: list[int], prompt: int, visual: Sequence[VisualToken]) -> None:
        """Keep account of what was read."""
        self.ids, self.prompt = ids, prompt
        self.visual += visual

    def refresh(self, chosen: Sequence[VisualToken], turn: int) -> list[VisualToken]:
        """Mark the patches and newlines of a choice that are here as chosen again.

        Returns:
            The patches and newlines that are not here.
        """
        here = {(token.image, token.place): token for token in self.visual if token.kind != "merged"}
        missing = []
        for token in chosen:
            held = here.get((token.image, token.place))
            if held is not None:
                held.turn = turn
            elif token.kind != "merged":
                missing.append(token)
        return missing

    def make_room(self, joining: Sequence[VisualToken], most: int, turn: int) -> None:
        """Drop what was not chosen for the longest time, until the joining tokens fit.

        Patches go by the last question whose choice had them, oldest first, then in the order in which they came; a
        newline goes with the last patch of its row; merged tokens, which stand for a whole region, go last.

        Raises:
            ValueError: The choice for this question alone has more tokens than may be held.
        """
        chosen = sum(token.turn == turn for token in self.visual) + len(joining)
        if chosen > most:
            raise ValueError(
                f"max_visual_tokens is {most}, but the choice for this question has {chosen} visual tokens, newlines "
                f"included: raise it to at least {chosen}, or set a lower token_recovery budget."
            )
        patches = Counter((token.image, token.row) for token in [*self.visual, *joining] if token.kind == "patch")
        newlines = {(token.image, token.row): token for token in self.visual if token.kind == "newline"}
        old = [token for token in self.visual if token.turn < turn and token.kind != "newline"]
        old.sort(key=lambda token: (token.kind == "merged", token.turn, token.entry), reverse=True)
        leaving: list[VisualToken] = []
        while old and len(self.visual) + len(joining) - len(leaving) > most:
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
        for layer in self.cache.layers:
            index = stays.nonzero().flatten().to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(-2, index), layer.values.index_select(-2, index)
        entries = (stays.cumsum(0) - 1).tolist()
        self.visual = [token for token in self.visual if stays[token.entry]]
        for token in self.visual:
            token.entry = entries[token.entry]


def visual_tokens(layout: ImageLayout, record: TokenRecoveryOutput, first: int, turn: int) -> list[VisualToken]:
    """The tokens of a layout's pictures in the order in which they enter the prompt.

    Args:
        layout: Which placeholder stands for what.
        record: How the tokens of all its pictures were chosen.
        first: The first picture's number in the conversation.
        turn: The question that they were chosen for.
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
