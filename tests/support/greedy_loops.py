"""The loops that have a kernel, and images on which to run them."""

from __future__ import annotations

from reccomp_hf.core import greedy
from reccomp_hf.core.methods import cdpruner, mmtok, scope, vispruner

LOOPS = {
    "cover": scope._cover,
    "cover_rows": mmtok._most_coverage,
    "drop_alike": vispruner._drop,
    "farthest": greedy.farthest_points,
    "follow": greedy.follow,
    "widen": cdpruner._widen_by_table,
}
"""Name of a kernel -> the loop, which takes the kernel where it can."""
CONTENT = {"coverage_share": 1.0, "coverage_by": "content", "merged_tokens": 0}
PLACE = {"coverage_share": 1.0, "coverage_by": "place", "merged_tokens": 0}
CHOICES = {
    "herding": (["follow"], CONTENT),
    "farthest points": (["farthest"], PLACE),
    "diversity": (["widen"], {"text_share": 1.0, "text_by": "diversity", "merged_tokens": 0}),
    "divprune": (["follow"], {"method": "divprune"}),
    "cdpruner": (["widen"], {"method": "cdpruner"}),
    "scope": (["cover"], {"method": "scope"}),
    "vispruner": (["drop_alike"], {"method": "vispruner"}),
    "mmtok": (["cover"], {"method": "mmtok"}),
}
"""Kernels that a choice takes, and its fields."""
