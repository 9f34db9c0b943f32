"""Method `visual`: the patches that the class token attends to most, and nothing else.

FasterVLM (Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818):
the attention of CLIP's class token in the next-to-last block, averaged over heads.
"""

from __future__ import annotations

from ..features import TokenSelection, VisualFeatures
from ..settings import Settings
from ..tensors import top_mask
from .budgets import spend
from .contract import SALIENCY, RecoveryMethod


def _select(features: VisualFeatures, settings: Settings) -> TokenSelection:
    saliency, spending = features.saliency(settings.visual_heads), spend(features, settings)
    visual = spending.whole | top_mask(saliency, spending.counts, features.valid)
    return features.keep(visual=visual, saliency=saliency, known_sizes=spending.sizes())


VISUAL = RecoveryMethod(
    _select,
    budget="required",
    defaults={"visual_layer": -2, "visual_heads": "mean"},
    fields=SALIENCY,
    source="FasterVLM (Zhang et al., arXiv 2412.01818)",
)

__all__ = ["VISUAL"]
