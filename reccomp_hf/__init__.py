"""Token recovery for LLaVA in transformers: models that read a fraction of their visual tokens.

Importing this package registers its model types with transformers' Auto classes; nothing is patched. The names below
are imported when they are first used, as in transformers itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from .core import __version__ as __version__

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .checkpoints.convert import convert
    from .checkpoints.loading import load_image_encoder
    from .conversation.conversation import Conversation
    from .core.choosing import recover_tokens
    from .core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
    from .core.features import MergedTokens, TokenRecoveryOutput, TokenSelection, VisualFeatures
    from .core.methods.contract import RecoveryMethod
    from .core.methods.registry import method_names, register_method
    from .core.modeling_llava import LlavaRecCompForConditionalGeneration, LlavaRecCompModel
    from .core.modeling_llava_next import LlavaNextRecCompForConditionalGeneration, LlavaNextRecCompModel
    from .core.outliers import local_outlier_factor
    from .core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
    from .engines.embedding import ImageEmbeds, embed_images, image_embeds_part
    from .engines.trl import CompressedTrainerMixin
    from .measure.plot import plot_recovery
    from .measure.tuning.running import tune

    AutoModelForVision2Seq: Any

_MODULES = {
    "checkpoints.convert": ("convert",),
    "checkpoints.loading": ("load_image_encoder",),
    "conversation.conversation": ("Conversation",),
    "core.choosing": ("recover_tokens",),
    "core.configuration": ("LlavaNextRecCompConfig", "LlavaRecCompConfig", "TokenRecoveryConfig"),
    "core.features": ("MergedTokens", "TokenRecoveryOutput", "TokenSelection", "VisualFeatures"),
    "core.methods.contract": ("RecoveryMethod",),
    "core.methods.registry": ("method_names", "register_method"),
    "core.modeling_llava": ("LlavaRecCompForConditionalGeneration", "LlavaRecCompModel"),
    "core.modeling_llava_next": ("LlavaNextRecCompForConditionalGeneration", "LlavaNextRecCompModel"),
    "core.outliers": ("local_outlier_factor",),
    "core.processing": ("LlavaNextRecCompProcessor", "LlavaRecCompProcessor"),
    "engines.embedding": ("ImageEmbeds", "embed_images", "image_embeds_part"),
    "engines.trl": ("CompressedTrainerMixin",),
    "measure.plot": ("plot_recovery",),
    "measure.tuning.running": ("tune",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def register() -> None:
    """Register configs, models and processors with transformers' Auto classes; a second call does nothing.

    Raises:
        ValueError: The model type is taken by another class.
    """
    from transformers import AutoConfig, AutoModel, AutoProcessor
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .core import compat, configuration, modeling_llava, modeling_llava_next, processing
    from .core.remote_code import HEAD_CLASSES

    llava = (
        configuration.LlavaRecCompConfig,
        modeling_llava.LlavaRecCompForConditionalGeneration,
        modeling_llava.LlavaRecCompModel,
        processing.LlavaRecCompProcessor,
    )
    llava_next = (
        configuration.LlavaNextRecCompConfig,
        modeling_llava_next.LlavaNextRecCompForConditionalGeneration,
        modeling_llava_next.LlavaNextRecCompModel,
        processing.LlavaNextRecCompProcessor,
    )
    for config, head_model, base_model, processor in (llava, llava_next):
        model_type = config.model_type
        if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] is config:
            continue
        AutoConfig.register(model_type, config)  # raises if another class has the model type
        AutoModel.register(config, base_model, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
        for auto in filter(None, map(compat.auto_class, (*HEAD_CLASSES, *compat.HEADS_OF_PROGRAMS))):
            auto.register(config, head_model, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name == "AutoModelForVision2Seq":
        value = importlib.import_module(".core.compat", __name__).auto_model_for_vision2seq()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process was started as `reccomp-hf ...` or `python -m reccomp_hf ...`, also by a launcher.

    Such a process registers just before it runs a command, so that `--help` or a typo does not wait for torch.
    `sys.argv` has only `-m` while the package is imported, and is replaced in processes that this one spawns;
    `sys.orig_argv` names the program.
    """
    started = sys.orig_argv[-len(sys.argv) :] if sys.argv else []  # the program and its arguments
    program = started[0] if started else ""
    if sys.argv[:1] == ["-m"]:
        return program.removeprefix("-m") == __name__
    return os.path.basename(program) in ("reccomp-hf", "reccomp-hf.exe", "reccomp-hf-script.py")


if not _is_command_line():
    register()

__all__ = [
    "AutoModelForVision2Seq",
    "CompressedTrainerMixin",
    "Conversation",
    "ImageEmbeds",
    "LlavaNextRecCompConfig",
    "LlavaNextRecCompForConditionalGeneration",
    "LlavaNextRecCompModel",
    "LlavaNextRecCompProcessor",
    "LlavaRecCompConfig",
    "LlavaRecCompForConditionalGeneration",
    "LlavaRecCompModel",
    "LlavaRecCompProcessor",
    "MergedTokens",
    "RecoveryMethod",
    "TokenRecoveryConfig",
    "TokenRecoveryOutput",
    "TokenSelection",
    "VisualFeatures",
    "convert",
    "embed_images",
    "image_embeds_part",
    "load_image_encoder",
    "local_outlier_factor",
    "method_names",
    "plot_recovery",
    "recover_tokens",
    "register",
    "register_method",
    "tune",
]
