"""Quality of the answers: accuracy, agreement with the uncompressed model, true token counts, intervals."""

from ..intervals import Interval
from .plotting import plot_accuracy
from .report import EvaluationReport, SettingResult
from .running import DEFAULT_BATCH_SIZE, evaluate
from .samples import Sample, demo_samples, load_samples, normalize_answer
from .settings import DEFAULT_SETTINGS, Setting, named_settings, parse_setting, parse_settings

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_SETTINGS",
    "EvaluationReport",
    "Interval",
    "Sample",
    "Setting",
    "SettingResult",
    "demo_samples",
    "evaluate",
    "load_samples",
    "named_settings",
    "normalize_answer",
    "parse_setting",
    "parse_settings",
    "plot_accuracy",
]
