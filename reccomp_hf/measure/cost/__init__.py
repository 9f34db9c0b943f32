"""Estimated cost of a LLaVA on an accelerator, see `estimate`."""

from .estimate import (
    DTYPES,
    HARDWARE,
    NEW_TOKENS,
    USABLE,
    Cost,
    Hardware,
    Operator,
    compare_costs,
    decode_cost,
    kv_cache_bytes,
    largest_batch,
    parameter_counts,
    prefill_cost,
    vision_cost,
    weight_bytes,
)

__all__ = [
    "DTYPES",
    "HARDWARE",
    "NEW_TOKENS",
    "USABLE",
    "Cost",
    "Hardware",
    "Operator",
    "compare_costs",
    "decode_cost",
    "kv_cache_bytes",
    "largest_batch",
    "parameter_counts",
    "prefill_cost",
    "vision_cost",
    "weight_bytes",
]
