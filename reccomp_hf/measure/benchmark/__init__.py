"""A benchmark: stock, ours and the limit, interleaved in one process, with ratios taken within a round.

`compare` times a model end to end and returns JSON values; the text and the figure are made of these.
"""

from .batches import noise_batch, scene_batch
from .capacity import check_gpu, largest_batches
from .comparing import BATCH_SIZES, BUDGETS, DYNAMIC, compare
from .models import CONFIGS, named_config, random_model, sharpen
from .plotting import plot_comparison
from .published_speed import published_parts
from .reporting import comparison_text
from .speed import Case, Part, equal_answers, speed_report
from .speed_text import speed_markdown

__all__ = [
    "BATCH_SIZES",
    "BUDGETS",
    "CONFIGS",
    "DYNAMIC",
    "Case",
    "Part",
    "check_gpu",
    "compare",
    "comparison_text",
    "equal_answers",
    "largest_batches",
    "named_config",
    "noise_batch",
    "plot_comparison",
    "published_parts",
    "random_model",
    "scene_batch",
    "sharpen",
    "speed_markdown",
    "speed_report",
]
