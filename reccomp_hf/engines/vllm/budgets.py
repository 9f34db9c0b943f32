"""The budget of a request, and its form in vLLM's multimodal fields, which hold tensors: JSON text as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.configuration import TokenRecoveryConfig
from ...core.counting import fixed_tokens, picture_tokens
from .checks import override

Budget = int | float | None
"""Tokens (int), a share of the image's tokens (float), or `None` for the budget of the checkpoint."""


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
            f"{overrides!r}. Other fields are set for the whole server: {override()}."
        )
    if overrides["budget"] is None or not section.enabled:
        raise ValueError(
            "A request's budget must be an int >= 1 or a float in (0, 1], and the checkpoint's token recovery "
            f"enabled; got {overrides['budget']!r} with enabled={section.enabled}."
        )
    budget = section.replace(overrides).budget
    own = budget == section.budget and isinstance(budget, type(section.budget))
    return None if own else budget  # equal requests are then equal in a cache


def request_section(section: TokenRecoveryConfig, budget: Budget) -> TokenRecoveryConfig:
    """The section with the budget of a request."""
    return section if budget is None else section.replace({"budget": budget})


def count_tokens(config: Any, budget: Budget, size: tuple[int, int]) -> int:
    """Number of tokens of an image under a budget.

    Args:
        config: The checkpoint's config.
        budget: The budget of the request.
        size: Width and height of the image in pixels.

    Raises:
        ValueError: More tokens than under the checkpoint's own budget, with which memory was profiled.
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
    "request_budget",
    "request_section",
]
