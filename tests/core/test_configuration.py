"""The values of the section's defaults and presets: checkpoints that leave a field out depend on them."""

import dataclasses

import pytest

from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.settings import PRESETS, Settings

PAPER = {
    "version": 1,
    "enabled": True,
    "method": "recoverable",
    "method_options": {},
    "budget": None,
    "text_share": 0.5,
    "text_limit": "share",
    "merged_tokens": 8,
    "coverage_share": 0.0,
    "coverage_by": "place",
    "outlier_neighbors": 20,
    "merge_neighbors": 10,
    "outlier_threshold": 1.5,
    "text_relevance": "last",
    "text_relevance_sign": 1,
    "visual_layer": -1,
    "visual_heads": "joint",
    "position_ids": "compact",
    "newlines": "kept",
    "text_encoder_config": None,
}
BALANCED = {
    "budget": 64,
    "text_relevance": "value",
    "visual_layer": -2,
    "text_share": 1.0,
    "text_limit": "outliers",
    "coverage_share": 0.25,
    "coverage_by": "content",
    "merged_tokens": 0,
    "position_ids": "original",
}


def test_the_defaults_are_the_papers():
    assert TokenRecoveryConfig().to_dict() == dataclasses.asdict(Settings()) == PAPER


@pytest.mark.parametrize(
    ("preset", "fields"), [("paper", {}), ("authors", {"method": "authors"}), ("balanced", BALANCED)]
)
def test_presets(preset, fields):
    assert TokenRecoveryConfig.from_preset(preset).to_dict() == PAPER | fields
    assert set(PRESETS) == {"paper", "authors", "balanced"}
