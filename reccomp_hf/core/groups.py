"""Images of a batch for which different rules hold: their groups, and the tokens of all in the images' order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import TokenRecoveryOutput
from .picture_tokens import Choice, PictureTokens
from .tensor_checks import check_ids


@dataclasses.dataclass
class GroupedPictures:
    """The tokens of a batch's images, or the choice, made in groups with settings of their own. I images, T tiles.

    Args:
        parts: The tokens or the choice of each group.
        groups: The images of each group.
        tiles: Number of tiles of each image.
    """

    parts: Sequence[Choice | PictureTokens]
    groups: list[list[int]]
    tiles: list[int]

    @property
    def lengths(self) -> Tensor:
        """(I,) int64, tokens of each image, newlines included."""
        return self._of_images([part.lengths for part in self.parts])

    @property
    def non_finite(self) -> Tensor:
        """(T,) int64, 1 for each tile whose features hold NaN or infinity."""
        return self._of_tiles([part.non_finite for part in self.parts])

    @property
    def unread(self) -> list[Tensor]:
        """The numbers, as 1-D tensors, whose values `read` takes."""
        return [values for part in self.parts for values in part.unread]

    def read(self, values: list[int]) -> None:
        """Set the sizes from the values of `unread`, one tensor after the other."""
        left = iter(values)
        for part in self.parts:
            part.read(list(itertools.islice(left, sum(map(len, part.unread)))))

    def records(self) -> list[TokenRecoveryOutput]:
        """The record of each image, for parts that are choices."""
        found: dict[int, TokenRecoveryOutput] = {}
        for part, group in zip(self.parts, self.groups, strict=True):
            assert isinstance(part, Choice)
            found.update(zip(group, part.records(), strict=True))
        return [found[image] for image in range(len(self.tiles))]

    def tokens(self, parts: Sequence[PictureTokens]) -> PictureTokens:
        """The tokens of all images in their order, given those of each group.

        In the record, images whose settings read no question have a text similarity of -inf if others have one.
        """
        lengths = [0] * len(self.tiles)
        for part, group in zip(parts, self.groups, strict=True):
            for image, length in zip(group, part.image_lengths or [], strict=True):
                lengths[image] = length
        return PictureTokens(
            self._of_images(_padded([part.features for part in parts], 0)),
            self._of_images(_padded([part.places for part in parts], 0)),
            self._of_images([part.token_counts for part in parts]),
            self._of_images([part.newline_counts for part in parts]),
            self._of_tiles([part.non_finite for part in parts]),
            self._record([part.record for part in parts]),
            lengths,
        )

    def _record(self, records: Sequence[TokenRecoveryOutput]) -> TokenRecoveryOutput:
        fields: dict[str, Tensor | None] = {}
        for field in dataclasses.fields(TokenRecoveryOutput):
            given = [getattr(record, field.name) for record in records]
            if all(value is None for value in given):
                fields[field.name] = None
                continue
            values = [
                torch.full_like(record.saliency, -torch.inf) if value is None else value
                for record, value in zip(records, given, strict=True)
            ]
            if field.name in ("tokens", "places"):
                values = _padded(values, -1 if field.name == "places" else 0)
            fields[field.name] = self._of_tiles(values)
        return TokenRecoveryOutput(**fields)  # type: ignore[arg-type]

    def _of_images(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the groups' images, in the order of the images."""
        return _in_order(values, list(itertools.chain.from_iterable(self.groups)))

    def _of_tiles(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the groups' tiles, in the order of the tiles."""
        starts = [0, *itertools.accumulate(self.tiles)]
        images = itertools.chain.from_iterable(self.groups)
        return _in_order(values, [tile for image in images for tile in range(starts[image], starts[image + 1])])


def check_rule(recovery_rule: Tensor | None, rows: int) -> Tensor:
    """Return the rule of every row of a call; refuse a call without it, for a section with rules.

    Raises:
        ValueError: It is missing, or does not fit the call.
    """
    if recovery_rule is None:
        raise ValueError(
            "token_recovery.rules need the rule of every row: recovery_rule is None. The processor of this checkpoint "
            "writes it (AutoProcessor.from_pretrained); for other rules set processor.recovery_rules = rules or pass "
            "it recovery_rules=. To use the common settings for all rows, call with token_recovery={'rules': []}."
        )
    check_ids("recovery_rule", recovery_rule, 1)
    if len(recovery_rule) != rows:
        raise ValueError(f"recovery_rule must have one entry per row: got {len(recovery_rule)}, expected {rows}.")
    return recovery_rule


def read_rules_of_images(recovery_rule: Tensor, row_of_image: Tensor, rules: int) -> tuple[list[int], list[int]]:
    """Read the rule and the row of every image; the one read from the device that rules cost.

    Args:
        recovery_rule: (R,) int64, -1 for none.
        row_of_image: (I,) int64, on the same device.
        rules: Number of rules.

    Raises:
        ValueError: There is no such rule.
    """
    values = torch.cat([recovery_rule[row_of_image], row_of_image, recovery_rule]).tolist()
    images = len(row_of_image)
    for row, rule in enumerate(values[2 * images :]):
        if not -1 <= rule < rules:
            raise ValueError(
                f"recovery_rule of row {row} is {rule}, but token_recovery has {rules} rule(s), numbered from 0: the "
                "processor read other rules. Set processor.recovery_rules = model.config.token_recovery.rules."
            )
    return values[:images], values[images : 2 * images]


def _padded(parts: Sequence[Tensor], fill: float) -> list[Tensor]:
    """Tensors (B, K, ...) with a common K, padded on the right."""
    longest = max(part.shape[1] for part in parts)
    before = [0, 0] * (parts[0].ndim - 2)  # of the later dimensions
    return [torch.nn.functional.pad(part, [*before, 0, longest - part.shape[1]], value=fill) for part in parts]


def _in_order(values: Sequence[Tensor], numbers: list[int]) -> Tensor:
    """The rows of tensors, one after the other, sorted by their numbers."""
    return take_rows(torch.cat(list(values)), sorted(range(len(numbers)), key=numbers.__getitem__))


def take_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor by their numbers."""
    return values.index_select(0, torch.tensor(rows).to(values.device))


__all__ = ["GroupedPictures", "check_rule", "read_rules_of_images", "take_rows"]
