"""Bootstrap intervals over images: the questions on one image are dependent, so an image enters a draw as a whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, a share or a difference with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """As `str`, with signs: for differences."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclasses.dataclass(frozen=True)
class Draws:
    """Draws of images with replacement. Estimates that share the draws are paired.

    Args:
        pictures: The name of each question's image.
        resamples: Number of draws.
        seed: Seed of the draws.
    """

    pictures: Sequence[str]
    resamples: int = 1000
    seed: int = 0

    def ratio(self, values: npt.NDArray[Any], counted: npt.NDArray[np.bool_] | None = None) -> _Floats:
        """(1 + resamples,) mean of the values that count, first of the sample itself; NaN for a draw without any.

        Args:
            values: (Q,) a value for each question.
            counted: (Q,) bool, the questions that count; by default all.
        """
        counted = np.ones(len(values), bool) if counted is None else counted
        index, draws = self._images
        sums, counts = (
            np.bincount(index, weights=weights, minlength=draws.shape[1]) for weights in (values * counted, counted)
        )
        total = draws @ counts
        return np.divide(draws @ sums, total, out=np.full(len(draws), np.nan), where=total > 0)

    def mean(self, values: npt.NDArray[Any]) -> Interval:
        """Mean of (Q,) values with its interval."""
        return interval(self.ratio(np.asarray(values, dtype=float)))

    @functools.cached_property
    def _images(self) -> tuple[npt.NDArray[np.int64], _Floats]:
        """The index of each question's image, and how often each image is drawn: (1 + resamples, images)."""
        names, index = np.unique(list(self.pictures), return_inverse=True)
        rng = np.random.default_rng(self.seed)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=self.resamples)
        return index, np.concatenate([np.ones((1, len(names))), drawn]).astype(float)


def interval(estimates: _Floats) -> Interval:
    """The interval of (1 + resamples,) estimates, of which the first is the sample's own."""
    drawn = estimates[1:][~np.isnan(estimates[1:])]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (np.nan, np.nan)
    return Interval(float(estimates[0]), float(low), float(high))


__all__ = ["Draws", "Interval", "interval"]
