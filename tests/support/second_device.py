"""Run a method on features of a second device, which need not exist."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from reccomp_hf import RecoveryMethod, TokenRecoveryConfig, VisualFeatures

DEVICE = "meta"
BATCH, PATCHES, WIDTH, PROJECTED = 3, 16, 8, 12


def features_elsewhere(tiles: list[int] | None) -> VisualFeatures:
    """Features of three images, or of the tiles of several, on the second device."""

    def made(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=DEVICE)

    return VisualFeatures(
        made(BATCH, PATCHES, WIDTH),
        made(BATCH, WIDTH),
        made(BATCH, PATCHES + 1, WIDTH),
        made(BATCH, PATCHES),
        num_heads=2,
        valid=None if tiles is None else torch.ones(BATCH, PATCHES, dtype=torch.bool, device=DEVICE),
        tiles=tiles,
        projected=made(BATCH, PATCHES, PROJECTED),
        received=made(BATCH, 2, PATCHES),
        class_state=made(BATCH, WIDTH),
        word_similarity=made(BATCH, 3, PATCHES),
    )


def run_elsewhere(method: RecoveryMethod, settings: TokenRecoveryConfig, tiles: list[int] | None) -> set[str]:
    """The devices of everything that the method returns; an operation on two devices, or a read, raises."""
    known = mock.patch.object(torch, "is_autocast_enabled", lambda kind: False)  # autocast has no device `meta`
    with FakeTensorMode(), known:
        features = features_elsewhere(tiles)
        selection = method.select(features, settings)
        merged = method.merge(features, selection, settings, 2)
    tensors = [selection.kept_mask, selection.centre_mask, selection.counts, selection.sizes, selection.saliency]
    return {tensor.device.type for tensor in (*tensors, merged.tokens, merged.places, merged.cluster)}
