"""The contract of a method: how it chooses and merges tokens, and what it declares about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import LARGEST, Settings, did_you_mean, shown

RELEVANCE = ("text_relevance", "text_relevance_sign")
SALIENCY = ("visual_layer", "visual_heads")
METHOD_FIELDS = (*RELEVANCE, *SALIENCY)
"""Fields of the config section whose defaults belong to the method."""

BudgetUse = Literal["optional", "required", "none"]
TextUse = Literal["unused", "optional", "required"]


def merge_nothing(
    features: VisualFeatures, selection: TokenSelection, settings: Settings, max_merged: int
) -> MergedTokens:
    """No merged tokens: patches that are not kept are dropped."""
    dropped = torch.full_like(features.valid, -1, dtype=torch.long)
    return MergedTokens(features.hidden_states[:, :0], dropped[:, :0], dropped)


@dataclasses.dataclass(frozen=True)
class RecoveryMethod:
    """A way to choose tokens.

    Args:
        select: `select(features, settings)` returns the choice, best made by `features.keep(...)`, and reads nothing
            from the device.
        merge: `merge(features, selection, settings, max_merged)` makes the merged tokens, given the largest number of
            them in a row. The default makes none.
        text: Whether the question changes the choice: `"unused"`, `"optional"` (without a question the method chooses
            by the image alone; with a fixed budget and `text_share` 0 the question is not read), or `"required"`.
        reads_projected: Whether the choice reads LLaVA's projected features of all patches
            (`VisualFeatures.projected`); they are computed only then.
        reads_words: Whether the choice reads the question's words as LLaVA's language model embeds them
            (`VisualFeatures.word_similarity`), in place of the question that CLIP's text encoder reads
            (`VisualFeatures.text_similarity`). It needs `text="required"` and `reads_projected`.
        object_block: `object_block(settings, blocks)` is the index, from 0, of a block of the vision tower whose
            attention the choice reads besides that of `visual_layer` (`VisualFeatures.received`); `None` if it reads
            neither. It raises ValueError for an index that the settings ask for and the tower lacks.
        reads_class_token: Whether it reads the class token's features (`VisualFeatures.class_state`).
        scales_similarity: Whether the text similarity is divided by the root of the projection width.
        budget: Whether `budget` may be given (`"optional"`), must be (`"required"`), or must not (`"none"`).
        compact_only: Whether a token may have no place in the image, so that `position_ids` must be `"compact"`.
        shares_patches: Whether a patch may enter several merged tokens; its `cluster` is -1 then.
        defaults: Values of `text_relevance`, `text_relevance_sign`, `visual_layer` and `visual_heads` if the config
            does not give them: those of the published method.
        fields: Fields of the config section that the method reads besides `method`, `method_options`, `budget` and
            `position_ids`, for model cards; `None` if unknown.
        source: The method's name and its paper with arXiv number, for model cards; empty for a baseline.
        options: A frozen dataclass of the method's own settings, all with defaults, whose `__post_init__` raises
            ValueError for a bad value; `settings.options` is an instance made from `method_options`. An option
            `similarity` of value `"dot"` leaves the lengths of patches and question in `text_similarity`; an option
            `pooling` of value `"last"` embeds the question by its last place, padding included.

    Raises:
        ValueError: A default of another field, an unknown use of text or budget, words without what they need, or
            options that are not a dataclass.
    """

    select: Callable[[VisualFeatures, Settings], TokenSelection]
    merge: Callable[[VisualFeatures, TokenSelection, Settings, int], MergedTokens] = merge_nothing
    text: TextUse = "unused"
    reads_projected: bool = False
    reads_words: bool = False
    object_block: Callable[[Settings, int], int] | None = None
    reads_class_token: bool = False
    scales_similarity: bool = False
    budget: BudgetUse = "optional"
    compact_only: bool = False
    shares_patches: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: type | None = None
    fields: tuple[str, ...] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Check what can be checked before the method runs."""
        for name, allowed in (("text", TextUse), ("budget", BudgetUse)):
            if (value := getattr(self, name)) not in (values := allowed.__args__):  # type: ignore[attr-defined]
                raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, got {value!r}.")
        if other := [name for name in self.defaults if name not in METHOD_FIELDS]:
            raise ValueError(f"defaults may name {', '.join(METHOD_FIELDS)}, got {other[0]!r}.")
        if self.reads_words and not (self.text == "required" and self.reads_projected):
            raise ValueError(
                f"reads_words needs text='required' and reads_projected=True, got {self.text!r} and "
                f"{self.reads_projected!r}."
            )
        if self.options is not None and not dataclasses.is_dataclass(self.options):
            raise ValueError(f"options must be a dataclass with defaults, got {self.options!r}.")

    def reads_question(self, settings: Settings) -> bool:
        """Whether the question changes the choice under these settings."""
        can_use = self.text == "optional" and (settings.budget is None or settings.text_share > 0)
        return self.text == "required" or can_use

    def read_options(self, name: str, values: Mapping[str, Any]) -> Any:
        """The options of method `name` as its own dataclass; `None` for a method without options.

        Raises:
            ValueError: An unknown option, or a value that the method refuses.
        """
        known = [] if self.options is None else [field.name for field in dataclasses.fields(self.options)]
        for option in values:
            if option not in known:
                hint = did_you_mean(option, known, f"it has {', '.join(known) or 'no options'}.")
                raise ValueError(f"Unknown token_recovery.method_options {option!r} of method {name!r}; {hint}")
        try:
            return None if self.options is None else self.options(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"token_recovery.method_options of method {name!r}: {error}") from error


def check_int(name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Refuse a field or option that is not an int from `least` to `most`.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {shown(value)}.")
    if value > most:
        raise ValueError(f"{name} must be an int up to {most}, got {shown(value)}.")


def check_share(name: str, value: Any) -> None:
    """Refuse a field or option that is not a number in [0, 1].

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {shown(value)}.")


__all__ = [
    "METHOD_FIELDS",
    "RELEVANCE",
    "SALIENCY",
    "BudgetUse",
    "RecoveryMethod",
    "TextUse",
    "check_int",
    "check_share",
    "merge_nothing",
]
