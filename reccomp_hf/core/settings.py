"""The fields of the `token_recovery` section as plain data; `TokenRecoveryConfig` validates them."""

from __future__ import annotations

import dataclasses
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
    text_encoder_config: dict[str, Any] | None = None

    @property
    def options(self) -> Any:
        """`method_options` as an instance of the method's own dataclass; `None` for a method without options."""
        return vars(self).get("_options")


FIELDS = tuple(field.name for field in dataclasses.fields(Settings))
"""Names of the section's fields, in the order of config.json."""

__all__ = ["FIELDS", "Settings"]
