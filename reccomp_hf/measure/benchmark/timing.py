"""Comparable times: contenders take turns, and a ratio is taken between turns of one round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")
Measures = dict[str, float]
"""The results of one turn of a contender: name of a measure -> value."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Values of several rounds.

    Args:
        values: One value per round, in the order of the rounds.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return self._quantile(0.5)

    @property
    def low(self) -> float:
        """The lower quartile."""
        return self._quantile(0.25)

    @property
    def high(self) -> float:
        """The upper quartile."""
        return self._quantile(0.75)

    def over(self, other: Spread) -> Spread:
        """The ratio to another contender's value, round by round.

        Raises:
            ValueError: The numbers of rounds differ.
        """
        if len(self.values) != len(other.values):
            raise ValueError(f"Ratios need equally many rounds, got {len(self.values)} and {len(other.values)}.")
        return Spread(tuple(ours / theirs for ours, theirs in zip(self.values, other.values, strict=True)))

    def scaled(self, factor: float) -> Spread:
        """Every value multiplied by a factor."""
        return Spread(tuple(value * factor for value in self.values))

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and all values, as JSON values."""
        return {"median": self.median, "low": self.low, "high": self.high, "values": list(self.values)}

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.values, share))


class Stopwatch:
    """Measures the seconds of work on a device: by CUDA events on a GPU, by a clock elsewhere.

    Args:
        device: The device that the work runs on.
        cpu_time: Count the CPU seconds of this process, summed over its threads, instead of wall-clock time: other
            processes on a busy machine then disturb less. Not for a GPU.

    Raises:
        ValueError: `cpu_time` on a GPU.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        if cpu_time and device.type == "cuda":
            raise ValueError(f"CPU seconds say nothing about {device}: time without them, or with device cpu.")
        self.device = device
        self.clock = "CUDA events" if device.type == "cuda" else "CPU seconds" if cpu_time else "wall clock"
        self._now = time.process_time if cpu_time else time.perf_counter

    def time(self, work: Callable[[], Result]) -> tuple[float, Result]:
        """Do the work once; return the seconds until the device has finished, and the result of the work."""
        if self.device.type != "cuda":
            began = self._now()
            result = work()
            return self._now() - began, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            start.record()
            result = work()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result


def interleave(
    contenders: Mapping[str, Callable[[], Measures]], rounds: int, step: Callable[[], Any] = lambda: None
) -> dict[str, dict[str, Spread]]:
    """Let contenders take turns, round after round: a, b, c, then c, b, a, so that none always follows the same one.

    Args:
        contenders: Name -> function that takes one turn.
        rounds: Number of turns of each contender.
        step: Called after every turn, for a progress bar.

    Returns:
        The values of all rounds by contender and measure.

    Raises:
        ValueError: Fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"There must be at least one round, got {rounds}.")
    taken: dict[str, list[Measures]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            taken[name].append(contenders[name]())
            step()
    return {name: gather(turns) for name, turns in taken.items()}


def gather(turns: Sequence[Measures]) -> dict[str, Spread]:
    """Collect the values of several turns by measure."""
    return {measure: Spread(tuple(turn[measure] for turn in turns)) for measure in turns[0]}


__all__ = ["Measures", "Spread", "Stopwatch", "gather", "interleave"]
