"""LLaVA-1.5 with token recovery."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import LongTensor, Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from .compat import register_key_renames
from .configuration_reccomp import LlavaRecCompConfig
from .generation_reccomp import RecCompGenerationMixin
from .modeling_reccomp import RecCompMixin

if TYPE_CHECKING:  # transformers 4.57 takes out of a local folder only the files that this one names itself
    from .checks import check_supported  # noqa: F401
    from .layout import ImageLayout  # noqa: F401
    from .methods import get_method  # noqa: F401
    from .methods_authors import AUTHORS  # noqa: F401
    from .methods_baselines import POOLING_2X2  # noqa: F401
    from .methods_cdpruner import CDPRUNER  # noqa: F401
    from .methods_divprune import DIVPRUNE  # noqa: F401
    from .methods_prumerge import PRUMERGE  # noqa: F401
    from .methods_recoverable import RECOVERABLE  # noqa: F401
    from .methods_shared import spend  # noqa: F401
    from .methods_trim import TRIM  # noqa: F401
    from .methods_visionzip import VISIONZIP  # noqa: F401
    from .methods_vispruner import VISPRUNER  # noqa: F401
    from .methods_visual import VISUAL  # noqa: F401
    from .outliers import upper_outliers  # noqa: F401
    from .picture_tokens import visual_features  # noqa: F401
    from .recovery import recover_tokens  # noqa: F401
    from .recovery_modules import RecoveryModulesMixin  # noqa: F401
    from .relevance import class_saliency  # noqa: F401
    from .remote_code import model_auto_map  # noqa: F401
    from .selection import pack_rows  # noqa: F401
    from .splicing import plan_splice  # noqa: F401
    from .vision import EncodedImages  # noqa: F401


@dataclasses.dataclass
class LlavaRecCompModelOutputWithPast(LlavaModelOutputWithPast):
    """Stock outputs of the shortened sequence; the counts are `None` where nothing was compressed.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all pictures in reading order.
        visual_token_counts: (I,) int64, tokens that each picture became.
        newline_counts: (I,) int64, newline embeddings among its tokens, not counted above; 0 for LLaVA-1.5.
    """

    image_hidden_states: Tensor | None = None  # the stock field; 5.24 has a property, which would warn
    visual_token_counts: LongTensor | None = None
    newline_counts: LongTensor | None = None


@dataclasses.dataclass
class LlavaRecCompCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Stock outputs; loss and logits are of the shortened sequence. Counts are `None` where nothing was compressed.

    Args:
        image_hidden_states: (tokens, D), projected tokens of all pictures in reading order.
        visual_token_counts: (I,) int64, tokens that each picture became.
        newline_counts: (I,) int64, newline embeddings among its tokens, not counted above; 0 for LLaVA-1.5.
    """

    image_hidden_states: Tensor | None = None  # the stock field; 5.24 has a property, which would warn
    visual_token_counts: LongTensor | None = None
    newline_counts: LongTensor | None = None


class LlavaRecCompModel(RecCompMixin, LlavaModel):
    """`LlavaModel` (no language-model head) that reads recovered tokens."""

    config_class = LlavaRecCompConfig
    output_class = LlavaRecCompModelOutputWithPast
    _auto_class = "AutoModel"  # save_pretrained copies this file and what it imports
    _keys_to_ignore_on_load_unexpected = ["lm_head"]


class LlavaRecCompForConditionalGeneration(RecCompGenerationMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` that reads recovered tokens."""

    config_class = LlavaRecCompConfig
    output_class = LlavaRecCompCausalLMOutputWithPast
    _auto_class = "AutoModelForImageTextToText"  # save_pretrained copies this file and what it imports


# Here and not in the package's __init__: with trust_remote_code this file alone is imported.
register_key_renames("LlavaRecCompForConditionalGeneration", "llava")
register_key_renames("LlavaRecCompModel", "LlavaModel")

__all__ = ["LlavaRecCompForConditionalGeneration", "LlavaRecCompModel"]
