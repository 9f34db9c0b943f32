"""A benchmark: stock, ours and the limit, interleaved in one process, with ratios taken within a round.

`compare` times a model end to end, `compare_choosing` the choice of tokens alone against loops of straightforward
code, and `measure_scaling` how its cost grows. All return JSON values; the texts and figures are made of these.
"""

from ...experiments.selection.choosing import compare_choosing
from ...experiments.selection.scaling import measure_scaling
from .batches import noise_batch, scene_batch
from .capacity import check_gpu, largest_batches
from .comparing import BATCH_SIZES, BUDGETS, DYNAMIC, compare
from .models import CONFIGS, named_config, random_model, sharpen
from .plotting import plot_choosing, plot_comparison, plot_scaling
from .reporting import choosing_text, comparison_text, scaling_text

__all__ = [
    "BATCH_SIZES",
    "BUDGETS",
    "CONFIGS",
    "DYNAMIC",
    "check_gpu",
    "choosing_text",
    "compare",
    "compare_choosing",
    "comparison_text",
    "largest_batches",
    "measure_scaling",
    "named_config",
    "noise_batch",
    "plot_choosing",
    "plot_comparison",
    "plot_scaling",
    "random_model",
    "scaling_text",
    "scene_batch",
    "sharpen",
]
