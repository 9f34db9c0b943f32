"""The budget or rule of a request, and its form in vLLM's multimodal fields, which hold tensors: JSON as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.configuration import TokenRecoveryConfig
from ...core.counting import fixed_tokens, picture_tokens
from ...core.rules import NO_RULE, beginnings, find_rule
from ...core.settings import shown
from .checks import override

Budget = int | float | str | None
"""Tokens (int), a share of the image's tokens (float), `"rule N"` for the settings of rule N of the checkpoint, or
`None` for its common settings."""
_RULE = "rule "


def budget_to_tensor(budget: Budget) -> Tensor:
    """(n,) uint8, the budget as JSON text."""
    return torch.tensor(list(json.dumps(budget).encode()), dtype=torch.uint8)


def budget_from_tensor(text: Tensor) -> Budget:
    """The inverse of `budget_to_tensor`."""
    return json.loads(bytes(text.tolist()))


def request_budget(section: TokenRecoveryConfig, overrides: Any) -> Budget:
    """The budget that a request's `token_recovery` sets.

    Raises:
        ValueError: Another field, or a budget that is not valid.
    """
    if overrides is None:
        return None
    if not isinstance(overrides, Mapping) or set(overrides) != {"budget"}:
        raise ValueError(
            "A request's token_recovery may set only the budget, for example {'budget': 32}, got "
            f"{shown(overrides)}. Other fields are set for the whole server: {override()}."
        )
    if overrides["budget"] is None or not section.enabled:
        raise ValueError(
            "A request's budget must be an int >= 1 or a float in (0, 1], and the checkpoint's token recovery "
            f"enabled; got {overrides['budget']!r} with enabled={section.enabled}."
        )
    budget = section.replace(overrides).budget
    own = budget == section.budget and isinstance(budget, type(section.budget))
    return None if own else budget  # equal requests are then equal in a cache


def question_budget(section: TokenRecoveryConfig, questions: list[str]) -> Budget:
    """The budget of a request that sets none, by the rule that its question begins like."""
    rule = find_rule(section.rules, questions) if section.enabled else NO_RULE
    return None if rule == NO_RULE else f"{_RULE}{rule}"


def request_section(section: TokenRecoveryConfig, budget: Budget) -> TokenRecoveryConfig:
    """The settings of a request, without rules."""
    if budget is None or isinstance(budget, str):
        return section.of_rule(NO_RULE if budget is None else int(budget.removeprefix(_RULE)))
    return section.replace({"budget": budget})


def longest_question(config: Any, size: tuple[int, int]) -> str:
    """A question for which an image has the most tokens, for profiling."""
    section = config.token_recovery
    texts = ["What is this?", "This?", *(f"{beginnings(rule)[0]}?" for rule in section.rules)]
    return max(texts, key=lambda text: count_tokens(config, question_budget(section, [text]), size))


def count_tokens(config: Any, budget: Budget, size: tuple[int, int]) -> int:
    """Number of tokens of an image under a budget.

    Args:
        config: The checkpoint's config.
        budget: The budget of the request.
        size: Width and height of the image in pixels.

    Raises:
        ValueError: More tokens than under the checkpoint's own budgets, with which memory was profiled.
    """
    section = config.token_recovery
    _, patches, newlines = picture_tokens(config, size)
    if not section.enabled:
        return patches + newlines
    own = fixed_tokens(config, section, size)
    if own is None:  # no images are served: the most that embeddings of one can be
        return patches + newlines
    requested = request_section(section, budget)
    count = fixed_tokens(config, requested, size)
    assert count is not None
    if count > own:
        raise ValueError(
            f"A request's budget of {requested.budget} is {count} tokens of an image, more than the {own} with which "
            f"the server was started and its memory profiled. Ask for at most {own}, or start it with "
            f"{override(budget=count)}."
        )
    return count


__all__ = [
    "Budget",
    "budget_from_tensor",
    "budget_to_tensor",
    "count_tokens",
    "longest_question",
    "question_budget",
    "request_budget",
    "request_section",
]
