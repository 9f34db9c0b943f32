"""Greedy loops on a GPU: a Triton kernel makes all steps of a loop in one launch, where it can be used."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .tensors import is_traced

logger = logging.getLogger(__name__)

Loop = TypeVar("Loop", bound=Callable[..., Tensor])

_DEVICES = ("cuda",)
_LARGEST_GRID = 8192
"""Patches of a row that a kernel without a table keeps in registers."""
LARGEST_TABLE = 4096
"""Patches of a row of a kernel that reads their products, which it keeps in registers."""
_LARGEST_FACTOR = 2**20
"""Patches times picks of `widen`: in every step a program reads the rows of all earlier picks."""
_LEAST_BLOCK = 1024  # smaller images share its kernels, and so does the problem that checks them
_LARGEST_SUM = 2.0**62
"""The sum of whole numbers in `cover`, at most."""
_TILE_BYTES = 65536
"""Memory of the rows of a table that a kernel reads at once."""

_USABLE: dict[tuple[str, torch.device], bool] = {}
_SAID: set[str] = set()
_LOCK = threading.Lock()
_LOOPS_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("_LOOPS_ONLY", default=False)


def in_one_launch(name: str) -> Callable[[Loop], Loop]:
    """Let a Triton kernel stand in for a loop over steps, where it can be used.

    The kernel takes the same arguments and makes the same choice. It is compiled at its first use on a device, which
    takes a second or two (Triton keeps the result on disk), and is compared there with the loop on a small problem. If
    it cannot be compiled, or chooses differently, the loop runs, and the reason is logged once. Traced code
    (`torch.compile`, `torch.export`) takes the loop. A CUDA graph records the kernel, which its warm-up compiles; a
    capture without a warm-up takes the loop.

    Args:
        name: Name of the kernel in this module. The first argument of the loop is a tensor (B, ..., N).
    """

    def decorate(loop: Loop) -> Loop:
        @functools.wraps(loop)
        def choose(*arguments: Any) -> Tensor:
            return (_KERNELS[name] if _is_usable(name, loop, *arguments) else loop)(*arguments)

        return choose  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def loops_only() -> Iterator[None]:
    """A context in which loops run step by step although there are kernels, to compare both."""
    token = _LOOPS_ONLY.set(True)
    try:
        yield
    finally:
        _LOOPS_ONLY.reset(token)


def _is_usable(name: str, loop: Callable[..., Tensor], values: Tensor, *others: Any) -> bool:
    if values.device.type not in _DEVICES or is_traced(values) or _LOOPS_ONLY.get():
        return False
    patches = values.shape[-1]
    if not values.numel() or patches > (_LARGEST_GRID if name == "farthest" else LARGEST_TABLE):
        return False
    if name == "widen" and patches * others[3] > _LARGEST_FACTOR:
        return False
    key = name, values.device
    if key not in _USABLE:
        if _is_captured(values):
            return False
        with _LOCK:
            if key not in _USABLE:
                _USABLE[key] = _agrees(name, loop, values)
    return _USABLE[key]


def _is_captured(values: Tensor) -> bool:
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def _agrees(name: str, loop: Callable[..., Tensor], like: Tensor) -> bool:
    """Whether a kernel chooses as its loop does on the device of a tensor; if not, the reason is logged."""
    try:
        problem = [value.to(like.device) if isinstance(value, Tensor) else value for value in _PROBLEMS[name]()]
        if _KERNELS[name](*problem).equal(loop(*problem)):
            return True
        reason = f"kernel {name} chooses differently there"
    except Exception as error:  # whatever a missing compiler, an old driver, or another release of Triton raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if reason not in _SAID:
        _SAID.add(reason)
        logger.warning(
            "Tokens are chosen on %s without Triton, step by step, which is slower: %s", like.device, reason
        )
    return False


def _launch(name: str, chosen: Tensor, *arguments: Any, warps: int, **constants: Any) -> Tensor:
    """Run a kernel, one program per row of `chosen`, which it fills."""
    from .kernels_triton import KERNELS

    values = [value.contiguous() if isinstance(value, Tensor) else value for value in (*arguments, chosen)]
    with torch.cuda.device_of(chosen):
        KERNELS[name][(len(chosen),)](*values, chosen.shape[-1], **constants, num_warps=warps, num_stages=1)
    return chosen


def _block(patches: int) -> int:
    """The length of a vector of patches: a power of 2."""
    return max(_LEAST_BLOCK, 1 << (patches - 1).bit_length())


def _warps(block: int) -> int:
    """Warps of a program that goes over a table."""
    return min(16, block // 128)


def _tile(table: Tensor) -> int:
    """Rows of a table that are read at once: a power of 2."""
    return max(1, _TILE_BYTES // (_block(table.shape[-1]) * table.element_size()))


def _follow(
    table: Tensor, first: Tensor, then: Tensor, candidates: Tensor, counts: Tensor, _: int, add: bool
) -> Tensor:
    chosen = candidates.new_empty(candidates.shape)
    arguments = table, first, then, candidates, counts
    block = _block(table.shape[-1])
    return _launch("follow", chosen, *arguments, warps=block // 256, ADD=add, BLOCK=block)


def _farthest(distance: Tensor, candidates: Tensor, counts: Tensor, grid: tuple[int, int], _: int) -> Tensor:
    chosen, block = candidates.new_empty(candidates.shape), _block(distance.shape[-1])
    numbers = {"columns": grid[1], "area": grid[0] * grid[1], "apart": 2 * (grid[0] + grid[1])}
    warps = min(16, block // 256)
    return _launch("farthest", chosen, distance, candidates, counts, warps=warps, **numbers, BLOCK=block)


def _widen(table: Tensor, volumes: Tensor, candidates: Tensor, counts: Tensor, steps: int, least: float) -> Tensor:
    factors, chosen = table.new_empty(len(table), steps, table.shape[-1]), candidates.new_empty(candidates.shape)
    block = _block(table.shape[-1])
    arguments = table, volumes, candidates, counts, factors
    constants = {"NO_VOLUME": least, "TILE": _tile(table), "BLOCK": block}
    return _launch("widen", chosen, *arguments, warps=_warps(block), steps=steps, **constants)


def _cover(cosine: Tensor, weights: Tensor, candidates: Tensor, counts: Tensor, _: int) -> Tensor:
    # NaN, of which sums of whole numbers know nothing: it makes all gains NaN in the loop.
    weights = weights + cosine.masked_fill(~candidates.unsqueeze(1), 0).sum(-1) * 0
    unit = _LARGEST_SUM / _block(cosine.shape[-1])  # no cosine is larger than 1
    return _launch_cover(cosine, weights, candidates, candidates, counts, unit)


def _cover_rows(gains: Tensor, candidates: Tensor, counts: Tensor, _: int, most: float) -> Tensor:
    weights = gains.sum(-1) * 0 + 1  # or NaN, as above
    unit = _LARGEST_SUM / 2.0 ** (math.floor(math.log2(most)) + 1)
    return _launch_cover(gains, weights, candidates, candidates.new_ones(gains.shape[::2]), counts, unit)


def _launch_cover(
    table: Tensor, weights: Tensor, candidates: Tensor, counted: Tensor, counts: Tensor, unit: float
) -> Tensor:
    """Run `cover` on a table (B, N, R), with weights (B, N), and the rows R that count (B, R)."""
    changes, chosen = counts.new_empty(len(table), 3, table.shape[-1]), candidates.new_empty(candidates.shape)
    blocks = {"BLOCK": _block(table.shape[1]), "ROWS": _block(table.shape[2])}
    constants = {"UNIT": unit, "TILE": max(1, _TILE_BYTES // (blocks["BLOCK"] * changes.element_size())), **blocks}
    arguments = table, table.transpose(1, 2), weights, candidates, counted, counts, changes
    return _launch("cover", chosen, *arguments, warps=_warps(max(blocks.values())), rows=table.shape[2], **constants)


def _drop_alike(likeness: Tensor, queue: Tensor, left: Tensor, wanted: Tensor, most: int, _: list[int]) -> Tensor:
    rows, patches = queue.shape
    queues = torch.stack([queue, queue], 1)  # one is read and one is written, in turn
    odd, chosen = (queue.new_zeros(rows, patches, dtype=kind) for kind in (torch.int8, torch.bool))
    constants = {"TILE": _tile(likeness), "BLOCK": _block(patches)}
    arguments = likeness, queues, left, wanted, odd, likeness.new_empty(rows, patches)
    return _launch("drop_alike", chosen, *arguments, warps=16, most=most, **constants)


# ---- small problems ------------------------------------------------------------------------------------------------


def _drawn(rows: int, patches: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosines (B, N, N), numbers (B, N), candidates (B, N), and how many to choose (B,), the same every time."""
    generator = torch.Generator().manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(rows, patches, width, generator=generator), dim=-1)
    numbers = torch.rand(rows, patches, generator=generator)
    candidates = torch.rand(rows, patches, generator=generator) < 0.8
    return units @ units.transpose(1, 2), numbers, candidates, torch.arange(rows) * 9


def _problem_of_follow() -> tuple[Any, ...]:
    cosine, numbers, candidates, counts = _drawn(4, 64, 80)
    first = numbers.masked_fill(~candidates, -torch.inf).unsqueeze(1)
    return (
        (-cosine).masked_fill_(torch.eye(64, dtype=torch.bool), -torch.inf),
        first,
        first,
        candidates,
        counts,
        27,
        True,
    )


def _problem_of_farthest() -> tuple[Any, ...]:
    _, numbers, candidates, counts = _drawn(4, 64, 80)
    return (numbers * 64).long(), candidates, counts, (4, 8), 27  # two grids in a row


def _problem_of_widen() -> tuple[Any, ...]:
    cosine, numbers, candidates, counts = _drawn(4, 64, 80)
    weights = numbers.masked_fill(~candidates, 0).double()
    table = cosine.double() * weights.unsqueeze(1) * weights.unsqueeze(2)
    table.diagonal(dim1=1, dim2=2).copy_(weights.square())
    return table, weights.square().unsqueeze(1), candidates, counts, 27, 1e-9


def _problem_of_cover() -> tuple[Any, ...]:
    cosine, numbers, candidates, counts = _drawn(4, 64, 80)
    return cosine, numbers.double(), candidates, counts, 27


def _problem_of_cover_rows() -> tuple[Any, ...]:
    cosine, numbers, candidates, counts = _drawn(4, 64, 80)
    gains = torch.cat([cosine.double().softmax(-1) / 64, numbers.unsqueeze(-1).softmax(1)], -1)  # (4, 64, 65)
    return gains.masked_fill(~candidates.unsqueeze(-1), 0), candidates, counts, 27, 2.0


def _problem_of_drop_alike() -> tuple[Any, ...]:
    cosine, numbers, candidates, counts = _drawn(4, 64, 80)
    queue = numbers.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True)
    left = candidates.sum(-1)
    return cosine, queue, left, counts, 8, [64] * 20


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "cover": _cover,
    "cover_rows": _cover_rows,
    "drop_alike": _drop_alike,
    "farthest": _farthest,
    "follow": _follow,
    "widen": _widen,
}
_PROBLEMS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "cover": _problem_of_cover,
    "cover_rows": _problem_of_cover_rows,
    "drop_alike": _problem_of_drop_alike,
    "farthest": _problem_of_farthest,
    "follow": _problem_of_follow,
    "widen": _problem_of_widen,
}

__all__ = ["in_one_launch", "loops_only"]
