"""Method `visual`: the patches that the class token attends to most, and nothing else.

FasterVLM (Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818):
the attention of CLIP's class token in the next-to-last block, averaged over heads.
"""

from __future__ import annotations

from .configuration_reccomp import TokenRecoveryConfig
from .methods import SALIENCY, RecoveryMethod
from .methods_shared import select, spend
from .recovery import TokenSelection, VisualFeatures
from .selection import top_mask


def _select(features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    saliency, spending = features.saliency(config.visual_heads), spend(features, config)
    visual = spending.whole | top_mask(saliency, spending.counts, features.valid)
    return select(features, saliency, visual=visual, known_sizes=spending.sizes())


VISUAL = RecoveryMethod(
    _select,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    fields=SALIENCY,
    source="FasterVLM (Zhang et al., arXiv 2412.01818)",
)

__all__ = ["VISUAL"]
