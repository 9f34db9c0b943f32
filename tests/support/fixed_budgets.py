"""Settings with a fixed budget, which prefills of known sizes are tested with."""

import pytest

from reccomp_hf import TokenRecoveryConfig, method_names
from reccomp_hf.core.methods.registry import get_method

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
METHODS = {
    name: {"method": name, **({} if get_method(name).budget == "none" else {"budget": 16})} for name in method_names()
}
PRESETS = {
    f"preset {name}": {**TokenRecoveryConfig.from_preset(name).overridable(), "budget": 16}
    for name in ("paper", "balanced", "balanced-v1")
}
DYNAMIC = ("authors",)
"""Methods whose number of tokens depends on the images, whatever the settings."""
KNOWN = {name: fields for name, fields in {**METHODS, **PRESETS}.items() if name not in DYNAMIC}
"""Settings of every method for which sizes, or bounds of them, are known."""
each_known = pytest.mark.parametrize("fields", KNOWN.values(), ids=KNOWN)
each_budget = pytest.mark.parametrize("fields", FIXED.values(), ids=FIXED)
