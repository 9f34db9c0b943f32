"""The menu of settings: what each entry and a number of tokens change in the checkpoint's section."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...core.checks import most_tiles
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import patches_per_side
from ...core.methods.budgets import budget_tokens
from ...core.methods.registry import get_method, method_names
from ...core.settings import PRESETS

OWN, OFF = "own", "off"
_USUAL_SHARE = 1 / 9  # of the patches: 64 of 576


@dataclasses.dataclass(frozen=True)
class Menu:
    """The entries for a model.

    Args:
        config: The config of a compressed model.
    """

    config: Any

    @property
    def section(self) -> TokenRecoveryConfig:
        """The checkpoint's own settings."""
        return self.config.token_recovery

    @property
    def most(self) -> int:
        """The most tokens that a picture may have, newlines excluded."""
        return most_tiles(self.config) * self._patches

    @property
    def _patches(self) -> int:
        """Patches of a tile."""
        return patches_per_side(self.config) ** 2

    @property
    def usual(self) -> int:
        """A number of tokens for an entry that needs one and has none: a ninth of the patches of a tile."""
        return budget_tokens(_USUAL_SHARE, self._patches)

    @property
    def own_tokens(self) -> int:
        """The checkpoint's own budget in tokens, 0 for the dynamic one; a share counts the patches of a tile."""
        budget = self.section.budget
        return budget_tokens(budget, self._patches) if isinstance(budget, float) else budget or 0

    def entries(self) -> list[tuple[str, str]]:
        """Pairs of a label and a value, the checkpoint's own settings first."""
        own = f"own settings ({self.section.method})"
        return [
            (own, OWN),
            ("all tokens, uncompressed", OFF),
            *((f"preset {name}", f"preset:{name}") for name in PRESETS),
            *((f"method {name}", f"method:{name}") for name in method_names()),
        ]

    def takes_budget(self, entry: str) -> str:
        """Whether a number of tokens may be given (`"optional"`), must be (`"required"`), or must not (`"none"`)."""
        if entry == OFF:
            return "none"
        return get_method(self._section(entry, None).method).budget

    def tokens_for(self, entry: str, tokens: int) -> int:
        """The number that the slider moves to when an entry is chosen; 0 where the method decides.

        Args:
            entry: The new entry.
            tokens: The number that it shows.
        """
        if entry == OFF:
            return self.most
        if self.takes_budget(entry) == "none":
            return 0
        tokens = 0 if tokens == self.most else tokens  # the number of no compression
        kind, _, name = entry.partition(":")
        if kind == "preset":
            return (tokens or self.usual) if "budget" in PRESETS[name] else 0
        if entry == OWN:
            return self.own_tokens
        return tokens or self.usual

    def fields(self, entry: str, tokens: int) -> dict[str, Any]:
        """Fields of the section to override.

        Args:
            entry: A value of `entries`.
            tokens: Tokens per picture, 0 for the dynamic budget.

        Raises:
            ValueError: An unknown entry, a number out of range, or settings that contradict each other.
        """
        if entry == OFF:
            return {"enabled": False}
        if not 0 <= tokens <= self.most:
            raise ValueError(f"The budget must be from 0 to {self.most} tokens, got {tokens}.")
        if entry == OWN and tokens == self.own_tokens:
            return {}
        section = self._section(entry, tokens or None)
        return {name: value for name, value in section.overridable().items() if value != getattr(self.section, name)}

    def _section(self, entry: str, budget: int | None) -> TokenRecoveryConfig:
        """The settings of an entry; `budget` is left out where the method takes none, or needs one and has none."""
        kind, _, name = entry.partition(":")
        fields: dict[str, Any] = {}
        if kind == "preset" and name in PRESETS:
            fields = TokenRecoveryConfig.from_preset(name).overridable()
        elif kind == "method" and name in method_names():
            fields = {"method": name}
        elif entry != OWN:
            raise ValueError(f"There is no setting {entry[:80]!r} in the menu.")
        method = get_method(fields.get("method", self.section.method))
        if method.budget == "required" and budget is None:
            budget = self.usual
        fields["budget"] = None if method.budget == "none" else budget
        if method.compact_only:
            fields["position_ids"] = "compact"
        return self.section.replace({"enabled": True, **fields})


__all__ = ["OFF", "OWN", "Menu"]
