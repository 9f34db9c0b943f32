"""The threshold of the paper's method that gives a mean number of tokens: it differs from CLIP to CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...core.configuration import TokenRecoveryConfig
from ...data.progress import progress_bar
from ..evaluation.samples import Sample, encode_samples, with_encoded_images

_GRID = tuple(float(f"{value:.4g}") for value in np.geomspace(1.02, 2000.0, 48))


@torch.no_grad()
def dynamic_fields(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    average: int | float,
    shared: Mapping[str, Any],
    batch_size: int,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Fields of the preset `"paper"` with the threshold at which an image has a mean number of tokens.

    The choice is made at 48 thresholds, without the language model, and the one that is asked for lies between two.

    Args:
        model: A compressed LLaVA in eval mode.
        processor: The model's processor.
        samples: The questions.
        average: Mean tokens of an image, or their share of its patches.
        shared: Further fields of the section.
        batch_size: Questions per batch.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: No threshold gives this mean.
    """
    fields = {**TokenRecoveryConfig.from_preset("paper").overridable(), **shared}
    counts: list[tuple[float, ...]] = []
    with progress_bar(len(samples), "thresholds", progress) as bar:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            inputs = encode_samples(processor, batch).to(model.device, model.dtype)
            inputs = with_encoded_images(model, inputs, fields)
            patches = inputs["pixel_values"].layout.patch_counts if isinstance(average, float) else [1] * len(batch)
            columns = [_counts(model, inputs, {**fields, "outlier_threshold": at}, patches) for at in _GRID]
            counts += zip(*columns, strict=True)
            bar.update(len(batch))
    means = np.minimum.accumulate(np.mean(counts, axis=0))  # more tokens at a higher threshold are noise
    if not means[-1] <= average <= means[0]:
        raise ValueError(
            f"average must be between {means[-1]:.4g} and {means[0]:.4g} on these questions for the paper's method, "
            f"got {average}: it keeps at least its merged tokens; a fixed budget has no such limit."
        )
    at = np.interp(-float(average), -means, np.log(_GRID))
    return {**fields, "budget": None, "outlier_threshold": float(f"{np.exp(at):.4g}")}


def _counts(model: Any, inputs: dict[str, Any], fields: Mapping[str, Any], patches: Sequence[int]) -> list[float]:
    """Tokens of every image, divided by `patches`."""
    records = model.recover(**inputs, token_recovery=fields)
    return [int(record.counts.sum()) / count for record, count in zip(records, patches, strict=True)]


__all__ = ["dynamic_fields"]
