"""The values of the section's defaults and presets: checkpoints that leave a field out depend on them."""

import dataclasses

import pytest
import torch

from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.features import Sizes, TokenSelection
from reccomp_hf.core.settings import PRESETS, Settings

PAPER = {
    "version": 1,
    "enabled": True,
    "method": "recoverable",
    "method_options": {},
    "budget": None,
    "text_share": 0.5,
    "text_limit": "share",
    "text_by": "similarity",
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
    "text_limit": "half_or_few",
    "text_by": "diversity",
    "coverage_share": 0.125,
    "coverage_by": "content",
    "merged_tokens": 0,
    "position_ids": "original",
}


def test_the_defaults_are_the_papers():
    assert TokenRecoveryConfig().to_dict() == PAPER
    assert dataclasses.asdict(Settings()) == {**PAPER, "rules": []}


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("paper", {}),
        ("authors", {"method": "authors"}),
        ("balanced", BALANCED),
        ("balanced-v1", {**BALANCED, "text_limit": "outliers", "text_by": "similarity", "coverage_share": 0.25}),
    ],
)
def test_presets(preset, fields):
    assert TokenRecoveryConfig.from_preset(preset).to_dict() == PAPER | fields
    assert set(PRESETS) == {"paper", "authors", "balanced", "balanced-v1"}


def test_saving_reads_the_options_again():
    section = TokenRecoveryConfig(method="random", budget=4, method_options={"seed": 1})
    section.method_options["seed"] = 3
    assert section.to_dict()["method_options"]["seed"] == section.options.seed == 3


def test_known_sizes_may_be_three_ints():
    mask = torch.zeros(1, 4, dtype=torch.bool)
    selection = TokenSelection(mask, mask, mask, mask, mask.sum(-1), mask.float(), known_sizes=[4, 1, 4])
    assert selection.read_sizes() == Sizes(longest=4, most_merged=1, total=4)
