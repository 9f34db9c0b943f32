"""Token recovery for LLaVA in transformers: models that read a fraction of their visual tokens.

Importing this package registers its model types with transformers' Auto classes; nothing is patched.
"""

from . import compat
from .configuration_reccomp import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from .conversation import Conversation
from .convert import convert
from .embedding import ImageEmbeds, embed_images, image_embeds_part, load_image_encoder
from .methods import RecoveryMethod, register_method
from .modeling_llava_next_reccomp import LlavaNextRecCompForConditionalGeneration, LlavaNextRecCompModel
from .modeling_llava_reccomp import LlavaRecCompForConditionalGeneration, LlavaRecCompModel
from .outliers import local_outlier_factor
from .processing_reccomp import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .recovery import MergedTokens, TokenRecoveryOutput, TokenSelection, VisualFeatures, recover_tokens
from .registration import register
from .training import CompressedTrainerMixin
from .visualization import plot_recovery

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
    "plot_recovery",
    "recover_tokens",
    "register",
    "register_method",
]
