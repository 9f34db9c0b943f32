"""The settings that an evaluation compares, written as `NAME[:BUDGET][+field=value...]`.

A name is one of `NAMES` or the name of a registered method. `visual` is the paper's own first stage, as in the
README's tables; FasterVLM, which is the method `"visual"`, differs in layer and heads and is named `fastervlm`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from ...core.configuration import TokenRecoveryConfig, overridden
from ...core.methods.registry import get_method, method_names
from ...core.settings import PRESETS, did_you_mean

_STAGES = {"merged_tokens": 0}
NAMES: dict[str, dict[str, Any]] = {
    # The checkpoint's own section.
    "stored": {},
    # The stock model: every token.
    "off": {"enabled": False},
    **PRESETS,
    # One of the paper's stages alone, without merging; the first two differ in nothing but the choice.
    "visual": {**_STAGES, "text_share": 0.0},
    "text": {**_STAGES, "text_share": 1.0},
    # Evenly spread tokens. Like means of cells, they stand for a place in the image, and keep its position.
    "coverage": {**_STAGES, "coverage_share": 1.0, "position_ids": "original"},
    "pool": {"method": "pooling", "position_ids": "original"},
    "fastervlm": {"method": "visual"},
}
"""Name -> fields of `token_recovery`; a field that is not listed has its default, not the checkpoint's value."""

OFF = "off"
DEFAULT_SETTINGS = "off,paper,balanced:0.1,text:0.1,visual:0.1,coverage:0.1,random:0.1,pool:0.1"

_SINGLE_STAGES = ("visual", "text", "coverage")
_CLOSING = {"{": "}", "[": "]"}
_NOT_OVERRIDDEN = ("version", "text_encoder_config")  # they depend on the weights


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to compress.

    Attributes:
        name: The setting as the user wrote it.
        fields: Fields that override the checkpoint's section in a call.
    """

    name: str
    fields: dict[str, Any]

    @property
    def is_off(self) -> bool:
        """Whether the setting is the uncompressed model."""
        return self.fields.get("enabled") is False


def named_settings() -> dict[str, dict[str, Any]]:
    """Fields by name: `NAMES`, and every other registered method with its own defaults."""
    return {**NAMES, **{name: {"method": name} for name in method_names() if name not in NAMES}}


def parse_setting(text: str) -> Setting:
    """Read a setting.

    Args:
        text: `NAME`, a key of `NAMES` or a method; optionally `:BUDGET`, an int, a share in (0, 1] or `dynamic`;
            then any number of `+field=value`, the value as JSON or a plain word. For example
            `text:16+text_relevance=value` or `prumerge:dynamic+method_options={"neighbors":16}`.

    Raises:
        ValueError: An unknown name or field, or values that contradict each other.
    """
    head, *parts = _split(text.strip(), "+")
    name, colon, budget = head.partition(":")
    known = named_settings()
    if name not in known:
        hint = did_you_mean(name, known, f"write one of {', '.join(known)}.")
        raise ValueError(f"Unknown setting {name!r} in {text!r}; {hint}")
    fields: dict[str, Any] = {}
    if colon:
        fields["budget"] = _value(budget, text) if budget != "dynamic" else None
    for part in parts:
        field, equals, value = part.partition("=")
        if not field or not equals:
            raise ValueError(f"Setting {text!r}: expected +field=value, got {'+' + part!r}.")
        fields[field] = _value(value, text)
    fields = overridden(known[name], fields)
    if _needs_a_budget(name, known[name]) and fields.get("budget") is None:
        raise ValueError(f"Setting {text!r} needs a budget, since {name} has no count of its own: write {name}:0.1.")
    if name == OFF and set(fields) != {"enabled"}:
        raise ValueError(f"Setting {text!r}: off keeps every token and takes neither a budget nor fields.")
    try:
        whole = TokenRecoveryConfig(**fields).to_dict()
    except ValueError as error:
        raise ValueError(f"Setting {text!r}: {error}") from error
    if name not in ("stored", OFF):
        fields = {field: value for field, value in whole.items() if field not in _NOT_OVERRIDDEN}
    return Setting(text.strip(), fields)


def parse_settings(text: str | Iterable[str | Setting]) -> list[Setting]:
    """Read several settings, separated by commas or one by one; duplicates are dropped.

    Raises:
        ValueError: The list is empty, or as for `parse_setting`.
    """
    parts = split_settings(text) if isinstance(text, str) else list(text)
    settings = [part if isinstance(part, Setting) else parse_setting(part) for part in parts if part]
    if not settings:
        raise ValueError(f"The list of settings is empty, got {text!r}; write for example {DEFAULT_SETTINGS}.")
    return list({setting.name: setting for setting in settings}.values())


def split_settings(text: str) -> list[str]:
    """The settings in a text, separated by commas, not parsed yet."""
    return [part for part in _split(text, ",") if part]


def _needs_a_budget(name: str, fields: dict[str, Any]) -> bool:
    return name in _SINGLE_STAGES or ("method" in fields and get_method(fields["method"]).budget == "required")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that stand outside of JSON's braces, brackets and strings."""
    parts, quoted = [""], False
    closing: list[str] = []
    for place, letter in enumerate(text):
        quoted ^= letter == '"' and bool(closing) and text[place - 1] != "\\"
        if letter == separator and not closing:
            parts.append("")
            continue
        if not quoted and letter in _CLOSING:
            closing.append(_CLOSING[letter])
        elif not quoted and closing and letter == closing[-1]:
            closing.pop()
        parts[-1] += letter
    return parts


def _value(text: str, setting: str) -> Any:
    if not text:
        raise ValueError(f"Setting {setting!r} has an empty value.")
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    try:
        return float(text)  # .5 is not JSON
    except ValueError:
        return text


__all__ = [
    "DEFAULT_SETTINGS",
    "NAMES",
    "OFF",
    "Setting",
    "named_settings",
    "parse_setting",
    "parse_settings",
    "split_settings",
]
