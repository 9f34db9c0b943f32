"""A benchmark: stock, ours and the limit, interleaved in one process, with ratios taken within a round.

`compare` times a model end to end and returns JSON values; the text and the figure are made of these.
"""

from .batches import noise_batch, scene_batch
from .capacity import check_gpu, largest_batches
from .comparing import BATCH_SIZES, BUDGETS, DYNAMIC, compare
from .models import CONFIGS, named_config, random_model, sharpen
from .plotting import plot_comparison
from .reporting import comparison_text

__all__ = [
    "BATCH_SIZES",
    "BUDGETS",
    "CONFIGS",
    "DYNAMIC",
    "check_gpu",
    "compare",
    "comparison_text",
    "largest_batches",
    "named_config",
    "noise_batch",
    "plot_comparison",
    "random_model",
    "scene_batch",
    "sharpen",
]
