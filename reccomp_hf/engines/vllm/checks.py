"""What vLLM can serve, and how many tokens a picture then has. Every refusal says what to do instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...core.checks import check_supported, is_tiled
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import fixed_tokens, picture_tokens
from ...core.methods.registry import get_method

REQUEST_KEYS = ("token_recovery", "recovery_text", "recovery_turns")
"""Keys of a request's `mm_processor_kwargs` that are ours."""


def override(**fields: Any) -> str:
    """How to start vLLM with other fields of the section; `{...}` where none is given."""
    section = json.dumps(fields) if fields else "{...}"
    return f"--hf-overrides '{{\"token_recovery\": {section}}}' (hf_overrides= in Python)"


def check_servable(config: Any, *, pictures: bool = True, embeds: bool = False) -> None:
    """Refuse a checkpoint whose answers vLLM would change in silence, before anything is loaded.

    Args:
        config: The checkpoint's config.
        pictures: Whether requests may bring pictures.
        embeds: Whether requests may bring `image_embeds`.

    Raises:
        ValueError: Original positions, a number of tokens that depends on the picture's content, or a vision tower
            that token recovery does not know.
    """
    section = config.token_recovery
    if not section.enabled or not (pictures or embeds):
        return
    check_supported(config, section)
    if section.position_ids == "original":
        raise ValueError(
            'token_recovery.position_ids is "original", but vLLM numbers the tokens of a prompt consecutively: its '
            "answers would differ from those of transformers without a word. Serve at consecutive positions, which "
            f"transformers then takes too: {override(position_ids='compact')}, or convert with "
            'position_ids="compact".'
        )
    if not pictures:
        return
    if section.method == "pooling":
        raise ValueError(
            "Method 'pooling' makes whole cells, about as many as its budget, and vLLM must know the exact number of "
            f"tokens before it encodes a picture. Take another: {override(method='recoverable')}."
        )
    if fixed_tokens(config, section) is None:
        raise ValueError(_how_to_fix_the_count(section))
    if is_tiled(config) and section.newlines == "kept":
        raise ValueError(
            'token_recovery.newlines is "kept": how many newline embeddings stay depends on the picture, and vLLM '
            f"must know the number of tokens before it encodes one. Serve without them: {override(newlines='none')}, "
            'or convert with newlines="none".'
        )


def _how_to_fix_the_count(section: TokenRecoveryConfig) -> str:
    ways = (
        "or compress outside (reccomp-hf embed) and send image_embeds, with --enable-mm-embeds "
        "--limit-mm-per-prompt '{\"image\": 0}', to trusted clients only."
    )
    if get_method(section.method).budget == "none":
        return (
            f"Method {section.method!r} has no budget: how many tokens a picture becomes depends on its content, and "
            f"vLLM must know it before it encodes one. Take a method with a budget, "
            f"{override(method='recoverable', budget=64)}, {ways}"
        )
    return (
        "token_recovery.budget is null: how many tokens a picture becomes depends on its content, and vLLM must know "
        f"it before it encodes one. Set a budget, {override(budget=64)}, {ways}"
    )


def request_section(section: TokenRecoveryConfig, budget: float) -> TokenRecoveryConfig:
    """The section of a picture by a number: tokens, minus a share of its patches, or 0 for the checkpoint's budget."""
    return section if budget == 0 else section.replace({"budget": -budget if budget < 0 else int(budget)})


def request_budget(section: TokenRecoveryConfig, overrides: Any) -> float:
    """The budget that a request's `token_recovery` asks for, see `request_section`.

    Raises:
        ValueError: Another field, or no budget.
    """
    if overrides is None:
        return 0
    if not isinstance(overrides, Mapping) or set(overrides) != {"budget"}:
        raise ValueError(
            f"A request's token_recovery may set the budget alone, {{'budget': 32}} for one, got {overrides!r}. Other "
            f"fields are those of the server: {override()}."
        )
    if overrides["budget"] is None or not section.enabled:
        raise ValueError(
            "A request's budget must be an int >= 1 or a float in (0, 1], and the checkpoint's token recovery "
            f"enabled; got {overrides['budget']!r} with enabled={section.enabled}."
        )
    budget = section.replace(overrides).budget
    assert budget is not None
    if budget == section.budget and isinstance(budget, type(section.budget)):
        return 0
    return -budget if isinstance(budget, float) else budget


def count_tokens(config: Any, budget: float, size: tuple[int, int]) -> int:
    """Tokens that a picture of some width and height becomes.

    Raises:
        ValueError: More than under the checkpoint's own budget, with which the memory was measured.
    """
    section = config.token_recovery
    _, patches, newlines = picture_tokens(config, size)
    if not section.enabled:
        return patches + newlines
    own = fixed_tokens(config, section, size)
    if own is None:  # no pictures are served: the most that embeddings of one could be
        return patches + newlines
    asked = request_section(section, budget)
    count = fixed_tokens(config, asked, size)
    assert count is not None
    if count > own:
        raise ValueError(
            f"A request's budget of {asked.budget} is {count} tokens of a picture, more than the {own} with which the "
            f"server was started and its memory measured. Ask for at most {own}, or start it with "
            f"{override(budget=count)}."
        )
    return count


__all__ = [
    "REQUEST_KEYS",
    "check_servable",
    "count_tokens",
    "request_budget",
    "request_section",
]
