"""The contract of a method: how it chooses and merges tokens, and what it declares about itself."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from ..features import MergedTokens, TokenSelection, VisualFeatures
from ..settings import Settings

RELEVANCE = ("text_relevance", "text_relevance_sign")


SALIENCY = ("visual_layer", "visual_heads")


METHOD_FIELDS = (*RELEVANCE, *SALIENCY)
"""Fields of the config section whose defaults are the method's own."""


Budget = Literal["optional", "required", "none"]


_BUDGETS = ("optional", "required", "none")


def merge_nothing(
    features: VisualFeatures, selection: TokenSelection, config: Settings, max_merged: int
) -> MergedTokens:
    """No merged tokens: what is not kept is dropped."""
    dropped = torch.full_like(features.valid, -1, dtype=torch.long)
    return MergedTokens(features.hidden_states[:, :0], dropped[:, :0], dropped)


@dataclasses.dataclass(frozen=True)
class RecoveryMethod:
    """A way to choose tokens.

    Args:
        select: `select(features, config)` chooses patches without reading anything from the device.
        merge: `merge(features, selection, config, max_merged)` makes the merged tokens, given the largest number of
            them. The default makes none.
        reads_text: Whether a question changes the choice. With a fixed budget and `text_share` 0 it is not read.
        needs_text: Whether the method is undefined without a question; it is then read in any case.
        reads_projected: Whether the choice reads LLaVA's projected features of all patches
            (`VisualFeatures.projected`); they are computed only then.
        scales_similarity: Whether the text similarity is divided by the root of the projection width.
        budget: Whether `budget` may be given (`"optional"`), must be (`"required"`), or must not (`"none"`).
        compact_only: Whether a token may have no place in the picture, so that `position_ids` must be `"compact"`.
        shares_patches: Whether a patch may enter several merged tokens; its `cluster` is -1 then.
        defaults: Values of `text_relevance`, `text_relevance_sign`, `visual_layer` and `visual_heads` where the config
            does not give them: those of the published method.
        fields: Which fields of the config section it reads beyond `method`, `method_options`, `budget` and
            `position_ids`; `None`: perhaps any. Model cards show these, and costs are estimated by them.
        compares: What it compares with all patches of a tile, for the estimate of its cost: `"nothing"`, the
            `"tokens"` that come out, or all `"patches"`.
        source: Whose method it is, with the arXiv number of its paper, for model cards; empty for a baseline.
        options: A frozen dataclass of the method's own settings, all with defaults, whose `__post_init__` raises
            ValueError for a bad value; `config.options` is an instance made from `method_options`.

    Raises:
        ValueError: A default of another field, an unknown kind of budget, or options that are no dataclass.
    """

    select: Callable[[VisualFeatures, Settings], TokenSelection]
    merge: Callable[[VisualFeatures, TokenSelection, Settings, int], MergedTokens] = merge_nothing
    reads_text: bool = False
    needs_text: bool = False
    reads_projected: bool = False
    scales_similarity: bool = False
    budget: Budget = "optional"
    compact_only: bool = False
    shares_patches: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: type | None = None
    fields: tuple[str, ...] | None = None
    compares: Literal["nothing", "tokens", "patches"] = "nothing"
    source: str = ""

    def __post_init__(self) -> None:
        """Check what can be checked before the method runs."""
        if self.budget not in _BUDGETS:
            raise ValueError(f"budget must be {' or '.join(map(repr, _BUDGETS))}, got {self.budget!r}.")
        if other := [name for name in self.defaults if name not in METHOD_FIELDS]:
            raise ValueError(f"defaults may name {', '.join(METHOD_FIELDS)}, got {other[0]!r}.")
        if self.options is not None and not dataclasses.is_dataclass(self.options):
            raise ValueError(f"options must be a dataclass with defaults, got {self.options!r}.")

    def reads_question(self, config: Settings) -> bool:
        """Whether the question changes the choice under these settings."""
        return self.needs_text or (self.reads_text and (config.budget is None or config.text_share > 0))

    def read_options(self, name: str, values: Mapping[str, Any]) -> Any:
        """The options of method `name` as its own dataclass; `None` for a method without options.

        Raises:
            ValueError: An unknown option or a value that the method refuses.
        """
        known = [] if self.options is None else [field.name for field in dataclasses.fields(self.options)]
        for option in values:
            if option not in known:
                near = difflib.get_close_matches(str(option), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'no options'}."
                raise ValueError(f"Unknown token_recovery.method_options {option!r} of method {name!r}; {hint}")
        try:
            return None if self.options is None else self.options(**values)
        except ValueError as error:
            raise ValueError(f"token_recovery.method_options of method {name!r}: {error}") from error


def check_int(name: str, value: Any, least: int) -> None:
    """Refuse an option that is no int of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")


def check_share(name: str, value: Any) -> None:
    """Refuse an option that is no number in [0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}.")


__all__ = [
    "METHOD_FIELDS",
    "RELEVANCE",
    "SALIENCY",
    "Budget",
    "RecoveryMethod",
    "check_int",
    "check_share",
    "merge_nothing",
]
