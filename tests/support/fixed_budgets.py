"""Settings with a fixed budget, which prefills of known sizes are tested with."""

import pytest

MERGED = {"budget": 16, "merged_tokens": 4}
BALANCED = {
    "budget": 16,
    "coverage_share": 0.25,
    "coverage_by": "content",
    "text_limit": "outliers",
    "text_relevance": "value",
    "visual_layer": -2,
    "merged_tokens": 0,
    "position_ids": "original",
}
FIXED = {"merged": MERGED, "balanced": BALANCED, "a share": {"budget": 0.2}}
each_budget = pytest.mark.parametrize("fields", FIXED.values(), ids=FIXED)
