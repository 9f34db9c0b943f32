"""The fields of the `token_recovery` section as plain data, and the presets; `TokenRecoveryConfig` validates them."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a method; [`TokenRecoveryConfig`] documents each field."""

    version: int = 1
    enabled: bool = True
    method: str = "recoverable"
    method_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    budget: int | float | None = None
    text_share: float = 0.5
    text_limit: str = "share"
    text_by: str = "similarity"
    merged_tokens: int = 8
    coverage_share: float = 0.0
    coverage_by: str = "place"
    outlier_neighbors: int = 20
    merge_neighbors: int = 10
    outlier_threshold: float = 1.5
    text_relevance: str = "last"
    text_relevance_sign: int = 1
    visual_layer: int = -1
    visual_heads: str = "joint"
    position_ids: str = "compact"
    newlines: str = "kept"
    rules: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    text_encoder_config: dict[str, Any] | None = None

    @property
    def options(self) -> Any:
        """`method_options` as an instance of the method's own dataclass; `None` for a method without options."""
        return vars(self).get("_options")

    @property
    def of_rules(self) -> tuple[Any, ...]:
        """The settings under each rule, whole sections without rules of their own."""
        return vars(self).get("_of_rules", ())

    def of_rule(self, rule: int) -> Any:
        """The settings under a rule, or for -1 under none: a section without rules."""
        common = vars(self).get("_without_rules", self)
        return common if rule < 0 else self.of_rules[rule]

    @property
    def all_settings(self) -> tuple[Any, ...]:
        """The settings under no rule, then those under each rule."""
        return self.of_rule(-1), *self.of_rules


TEXT_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "vocab_size", "projection_dim"),
)
"""Fields of a CLIP text config that are numbers above 0."""
FIELDS = tuple(field.name for field in dataclasses.fields(Settings))
"""Names of the section's fields, in the order of config.json."""

_BALANCED: dict[str, Any] = {
    "budget": 64,
    "text_relevance": "value",
    "visual_layer": -2,
    "text_share": 1.0,
    "coverage_by": "content",
    "merged_tokens": 0,
    "position_ids": "original",
}
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's method as this package reads it; the number of tokens adapts to the image.
    "paper": {},
    # The computation of the paper's released code, for reproduction.
    "authors": {"method": "authors"},
    # A fixed budget with the settings that measured best on the demo models: the question takes half as many patches
    # as stand out for it, or 2 % of all if that is more, unlike each other, and the rest of the budget represents the
    # image as a whole.
    "balanced": {**_BALANCED, "text_limit": "half_or_few", "text_by": "diversity", "coverage_share": 0.125},
    # `balanced` as it was before `text_by`: the question takes the patches that stand out for it.
    "balanced-v1": {**_BALANCED, "text_limit": "outliers", "coverage_share": 0.25},
}

CHOICES: dict[str, tuple[str | int, ...]] = {
    "text_relevance": ("last", "penultimate", "value"),
    "text_relevance_sign": (1, -1),
    "visual_heads": ("joint", "mean"),
    "text_limit": ("share", "outliers", "half_outliers", "half_or_few"),
    "text_by": ("similarity", "diversity"),
    "coverage_by": ("place", "content"),
    "position_ids": ("compact", "original"),
    "newlines": ("kept", "none"),
}
"""Values of the fields that have few."""

LARGEST = 2**31 - 1
"""No number of the section is larger, except for the seed of a method."""


def as_json(name: str, value: Any) -> Any:
    """A field's value as a JSON file would return it.

    Raises:
        ValueError: JSON has no such value, or a number is not finite or does not fit into 64 bits.
    """

    def read_int(digits: str) -> int:
        if not -(2**63) <= (number := int(digits)) < 2**63:
            raise ValueError("an int does not fit into 64 bits")
        return number

    try:
        value = dict(value) if isinstance(value, Mapping) else value
        return json.loads(json.dumps(value, allow_nan=False), parse_int=read_int)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"token_recovery.{name} must be plain JSON with finite numbers, got {shown(value)} ({error}); write a "
            "number of numpy or torch as value.item()."
        ) from error


def fields_text(settings: Settings) -> str | None:
    """All fields as JSON: equal texts mean equal settings. `None` if a field is no longer JSON."""
    try:
        return json.dumps([vars(settings)[name] for name in FIELDS])
    except (TypeError, ValueError, RecursionError):
        return None


def shown(value: Any) -> str:
    """A value as an error message shows it: its `repr`, cut if it is long."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4300 digits, or an object's own repr
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def require(fits: bool, name: str, needed: str, received: Any) -> None:
    """Refuse a value of a field.

    Raises:
        ValueError: `fits` is false.
    """
    if not fits:
        raise ValueError(f"token_recovery.{name} must be {needed}, got {shown(received)}.")


def is_int(value: Any) -> bool:
    """Whether a value is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_budget(value: Any) -> bool:
    """Whether a value is a number of tokens, a share of them, or `None`."""
    if value is None:
        return True
    return 1 <= value <= LARGEST if is_int(value) else isinstance(value, float) and 0 < value <= 1


def did_you_mean(word: Any, known: Collection[str], otherwise: str = "") -> str:
    """A question about the nearest of the known words for the end of an error message.

    Args:
        word: The unknown word.
        known: The known ones.
        otherwise: The text to return if no word is near.
    """
    near = difflib.get_close_matches(str(word)[:200], known, n=1, cutoff=0.7)
    return f"did you mean {near[0]!r}?" if near else otherwise


__all__ = [
    "CHOICES",
    "FIELDS",
    "LARGEST",
    "PRESETS",
    "TEXT_SIZES",
    "Settings",
    "as_json",
    "did_you_mean",
    "fields_text",
    "is_budget",
    "is_int",
    "is_number",
    "require",
    "shown",
]
