"""A cost model: what a LLaVA costs on an accelerator before and after its visual tokens are cut.

A roofline estimate, per operator max(operations / peak, bytes / bandwidth). For the language model's prefill it is
the accounting of the paper's table and reproduces it ([`prefill_cost`]); what the paper leaves out stands beside it:
vision tower, text encoder, selection, key-value cache, decoding, the largest batch that fits. Everything is a lower
bound: real kernels take longer, and launching them is not counted.
"""

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
