"""The settings that tuning compares, and the budgets that it tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.checks import is_tiled
from ...core.configuration import overridden
from ...core.counting import picture_tokens
from ...core.methods.registry import reads_question
from ..evaluation.settings import Setting, parse_setting

_VALUE = "text_relevance=value"
FEW = (
    "balanced",
    "balanced+text_relevance_sign=-1",
    "balanced+text_relevance=last",
    "balanced+text_limit=outliers",
    "balanced+text_limit=share+coverage_share=0",
    "balanced+coverage_share=0.5",
    f"cdpruner+{_VALUE}+text_relevance_sign=1",
    "divprune",
    "coverage+coverage_by=content",
)
"""Settings that differ in what they read: the best of 43 by greedy choice on the demo models' validation scenes."""
MANY = (
    *FEW,
    "balanced+text_relevance=last+text_relevance_sign=-1",
    "balanced+text_relevance=penultimate",
    "balanced+text_limit=share+text_share=0.5",
    "balanced+coverage_share=0",
    "balanced+coverage_by=place",
    "balanced-v1",
    "balanced-v1+coverage_by=place",
    "balanced-v1+coverage_share=0.5",
    "balanced-v1+text_limit=share+text_share=0.5",
    "paper",
    "paper+merged_tokens=0",
    f"paper+{_VALUE}+visual_layer=-2",
    f"paper+{_VALUE}+visual_layer=-2+merged_tokens=0+coverage_share=0.5",
    "text",
    f"text+{_VALUE}",
    "visual",
    "visual+visual_layer=-2",
    "coverage",
    "pool",
    "fastervlm",
    "visionzip",
    "vispruner",
    "vispruner+visual_layer=-1",
    "prumerge",
    "prumerge_plus",
    "trim",
    f"trim+{_VALUE}",
    "cdpruner",
    f"cdpruner+{_VALUE}",
    "scope",
    "hiprune",
    "holov",
    "mmtok",
)
LISTS = {"few": FEW, "many": MANY}
LADDER = (0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5)
"""Budgets that are tried where none is given, as shares of the patches."""

SHARED = {"position_ids": "original"}
"""Fields that all settings share unless the user gives others: rules by question cannot change them."""
_TUNED = ("enabled", "method", "budget", "rules")
"""Fields that are tuned, and therefore not shared."""


def candidate_settings(
    model: Any,
    names: Sequence[str],
    budget: int | float,
    shared: Mapping[str, Any],
    *,
    strict: bool,
) -> dict[str, Setting]:
    """Settings at a budget, by their names with it.

    Args:
        model: A compressed LLaVA; without a text encoder, settings that read the question are left out.
        names: Settings without a budget, see `parse_setting`.
        budget: A number of tokens, or a share of the patches.
        shared: Fields that every setting gets, in addition to `SHARED`.
        strict: Whether a setting that cannot be used is an error; otherwise it is left out.

    Returns:
        The settings, at least one.

    Raises:
        ValueError: A setting that is not valid, or none that this checkpoint can use.
    """
    found: dict[str, Setting] = {}
    present = model.config.token_recovery
    reasons: list[str] = []
    for field in _TUNED:
        if field in shared:
            raise ValueError(f"{field} is what tuning chooses, so that candidates cannot share it: leave it out.")
    for name in names:
        try:
            setting = _setting(at_budget(name, budget), {**SHARED, **shared})
            section = present.replace(setting.fields)
            if present.text_encoder_config is None and reads_question(section):
                raise ValueError(f"Setting {name!r} reads the question, and this checkpoint has no text encoder.")
        except ValueError as error:
            if strict:
                raise
            reasons.append(str(error))
            continue
        found[setting.name] = setting
    if not found:
        raise ValueError(f"No setting can be used with this checkpoint: {reasons[0]}")
    return found


def _setting(text: str, shared: Mapping[str, Any]) -> Setting:
    parsed = parse_setting(text)
    for field in shared:
        if f"+{field}=" in text:
            raise ValueError(
                f"Setting {text!r} sets {field}, which all candidates share: give it for all of them "
                f"(--set {field}=...)."
            )
    if "method" not in parsed.fields:  # off, and what the checkpoint has stored
        raise ValueError(f"Setting {text!r} chooses no tokens of its own; name a preset or a method.")
    return Setting(parsed.name, overridden(parsed.fields, shared))


def budget_ladder(config: Any) -> tuple[int | float, ...]:
    """Budgets to try: numbers of tokens for LLaVA-1.5, shares of an image's patches for LLaVA-NeXT."""
    if is_tiled(config):
        return LADDER
    side = config.vision_config.image_size
    patches = picture_tokens(config, (side, side))[1]
    return tuple(dict.fromkeys(max(1, round(share * patches)) for share in LADDER))


def at_budget(name: str, budget: int | float) -> str:
    """A setting's name with a budget, as `parse_setting` reads it.

    Raises:
        ValueError: The name has a budget.
    """
    head, plus, rest = name.partition("+")
    if ":" in head:
        raise ValueError(f"Candidate {name!r} must not have a budget of its own: tuning sets it.")
    return f"{head}:{budget}{plus}{rest}"


__all__ = ["LADDER", "LISTS", "SHARED", "at_budget", "budget_ladder", "candidate_settings"]
