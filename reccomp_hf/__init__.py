"""Token recovery for LLaVA in transformers: models that read a fraction of their visual tokens.

Importing this package registers its model types with transformers' Auto classes; nothing is patched.
"""

from .checkpoints.convert import convert
from .checkpoints.loading import load_image_encoder
from .conversation.conversation import Conversation
from .core import compat
from .core.choosing import recover_tokens
from .core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from .core.features import MergedTokens, TokenRecoveryOutput, TokenSelection, VisualFeatures
from .core.methods.contract import RecoveryMethod
from .core.methods.registry import method_names, register_method
from .core.modeling_llava import LlavaRecCompForConditionalGeneration, LlavaRecCompModel
from .core.modeling_llava_next import LlavaNextRecCompForConditionalGeneration, LlavaNextRecCompModel
from .core.outliers import local_outlier_factor
from .core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .core.registration import register
from .engines.embedding import ImageEmbeds, embed_images, image_embeds_part
from .engines.trl import CompressedTrainerMixin
from .measure.plot import plot_recovery

__version__ = "0.1.0"

AutoModelForVision2Seq = compat.auto_model_for_vision2seq()

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
]
