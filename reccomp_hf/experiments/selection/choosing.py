"""`recover_tokens` against the loops of straightforward code, per image, on one thread."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...core.choosing import recover_tokens
from ...core.configuration import TokenRecoveryConfig
from ...data.progress import progress_bar
from ...measure.benchmark.comparing import check_counts
from ...measure.benchmark.environment import environment
from ...measure.benchmark.timing import Measures, Stopwatch, interleave
from .features import PATCHES, WIDTH, Features, make_features, one_thread
from .loops import Loop, plain, released
from .methods import count_methods, time_methods

BATCH_SIZES, ROUNDS = (1, 32), 15
AGREE = 1e-4
"""How far the loops' tokens may be from ours."""

CHOICES: dict[str, TokenRecoveryConfig] = {
    "dynamic": TokenRecoveryConfig(),
    "budget 64": TokenRecoveryConfig(budget=64),
    "balanced": TokenRecoveryConfig.from_preset("balanced"),
    "authors": TokenRecoveryConfig(method="authors"),
}
"""Settings that are timed."""
LOOPS: dict[str, tuple[Loop, str]] = {"released code": (released, "authors"), "plain loop": (plain, "dynamic")}
"""Name of a loop -> it, and the setting whose tokens it gives."""


@torch.no_grad()
def compare_choosing(
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = ROUNDS,
    patches: int = PATCHES,
    width: int = WIDTH,
    seed: int = 0,
    cpu_time: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Time the choice of tokens per image on one CPU thread in float32, ours and the loops in turns; then each method.

    Args:
        batch_sizes: Images that `recover_tokens` gets at once; the loops take one at a time.
        rounds: Turns of each.
        patches: Per image.
        width: Of a patch.
        seed: Of the features.
        cpu_time: Count CPU seconds of this process, see [`Stopwatch`].
        progress: Show a progress bar; `None` where stderr is a terminal.

    Returns:
        JSON values: `"loops"` (seconds per image), `"rows"`, one per setting and batch size, with seconds per image
        and the ratios of each loop's over it, and `"methods"`, see [`time_methods`].

    Raises:
        ImportError: scikit-learn is missing.
        RuntimeError: A loop and ours do not agree.
    """
    check_counts(rounds=rounds, patches=patches, **{f"batch size {size}": size for size in batch_sizes})
    features = make_features(max(max(batch_sizes), rounds), patches, width, seed)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-learn's, of equal values among the similarities
        kept = {name: _tokens(features, config) for name, config in CHOICES.items()}
        difference = {name: _difference(features, *entry) for name, entry in LOOPS.items()}
        stopwatch = Stopwatch(torch.device("cpu"), cpu_time)
        turns = _turns(features, batch_sizes, stopwatch)
        for turn in turns.values():  # warm up
            turn()
        with progress_bar(rounds * (len(turns) + count_methods()), "turns", progress) as bar:
            taken = interleave(turns, rounds, bar.update)
            methods = time_methods(features, rounds, stopwatch, bar.update, seed)
        facts = environment(torch.device("cpu"), torch.float32)
    times = {name: measures["seconds"] for name, measures in taken.items()}
    rows = [
        {
            "setting": name,
            "batch_size": size,
            "tokens": kept[name],
            "seconds_per_image": times[f"{name} {size}"].to_dict(),
            "ratios": {loop: times[loop].over(times[f"{name} {size}"]).to_dict() for loop in LOOPS},
        }
        for name in CHOICES
        for size in batch_sizes
    ]
    return {
        "environment": facts,
        "settings": {"patches": patches, "width": width, "rounds": rounds, "seed": seed, "clock": stopwatch.clock},
        "loops": {
            loop: {"seconds_per_image": times[loop].to_dict(), "same_tokens_as": same, "difference": difference[loop]}
            for loop, (_, same) in LOOPS.items()
        },
        "rows": rows,
        "methods": methods,
    }


def _turns(features: Features, batch_sizes: Sequence[int], stopwatch: Stopwatch) -> dict[str, Callable[[], Measures]]:
    """What takes a turn: the loops on the next image, ours on the next batch."""
    turns: dict[str, Callable[[], Measures]] = {}
    for loop, (run, same) in LOOPS.items():
        turns[loop] = _Turn(features, 1, stopwatch, functools.partial(_one, run, CHOICES[same]))
    for name, config in CHOICES.items():
        for size in batch_sizes:
            turns[f"{name} {size}"] = _Turn(features, size, stopwatch, functools.partial(_ours, config))
    return turns


class _Turn:
    """Work on a batch of images, every time on the next one."""

    def __init__(
        self, features: Features, size: int, stopwatch: Stopwatch, work: Callable[[Features], object]
    ) -> None:
        self.features, self.size, self.stopwatch, self.work, self.first = features, size, stopwatch, work, 0

    def __call__(self) -> Measures:
        batch = self.features[slice(self.first, self.first + self.size)]
        last = len(self.features.class_query) - self.size
        self.first = self.first + 1 if self.first < last else 0
        seconds, _ = self.stopwatch.time(lambda: self.work(batch))
        return {"seconds": seconds / self.size}


def _one(loop: Loop, config: TokenRecoveryConfig, features: Features) -> torch.Tensor:
    states, query, keys, similarity = (value[0] for value in features.arguments())
    return loop(states, query, keys, _scaled(similarity, config), config)


def _ours(config: TokenRecoveryConfig, features: Features) -> Any:
    states, query, keys, similarity = features.arguments()
    return recover_tokens(states, query, keys, _scaled(similarity, config), config)


def _scaled(similarity: torch.Tensor, config: TokenRecoveryConfig) -> torch.Tensor:
    """As the model gives it to the method: `authors` divides by the root of a projection width, CLIP's 768."""
    return similarity / 768**0.5 if config.method == "authors" else similarity


def _tokens(features: Features, config: TokenRecoveryConfig) -> float:
    return float(_ours(config, features).counts.float().mean())


def _difference(features: Features, loop: Loop, same: str) -> float:
    """The largest difference of a loop's tokens from ours on the first image.

    Raises:
        RuntimeError: They do not agree.
    """
    config, first = CHOICES[same], features[slice(0, 1)]
    expected, got = _one(loop, config, first), _ours(config, first).tokens[0]
    if expected.shape != got.shape or (difference := float((expected - got).abs().amax())) > AGREE:
        raise RuntimeError(
            f"The loop and setting {same!r} give different tokens, of shapes {tuple(expected.shape)} and "
            f"{tuple(got.shape)}: their times cannot be compared."
        )
    return difference


__all__ = ["BATCH_SIZES", "CHOICES", "LOOPS", "ROUNDS", "compare_choosing"]
