"""Triton kernels of the greedy loops: one program per row, vectors of its N patches in registers, all steps inside.

They read tables (B, N, N) that matrix products fill before. What `kernels.py` says of the loops holds: the same picks,
the first among equals, NaN the largest. Triton comes with torch's builds for GPUs; nothing else needs it.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton, which comes with torch's builds for GPUs, is missing: pip install triton.") from error

_ABOVE_ALL = tl.constexpr(2**62)  # no coverage in whole numbers is so large
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _largest(values):
    # The largest value and its place; NaN, which torch holds to be the largest, is returned as infinity.
    comparable = tl.where(values != values, _INFINITY, values)
    return tl.max(comparable, 0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def follow(table, first, then, candidates, counts, chosen, patches, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Make the picks of herding or of max-min diversity: each changes the scores by its row of the table."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    exists = place < patches
    start = row * patches
    _, pick = _largest(tl.load(first + start + place, mask=exists, other=-_INFINITY))
    score = tl.load(then + start + place, mask=exists, other=-_INFINITY)
    taken = place < 0
    for _step in range(tl.load(counts + row)):
        taken = taken | (place == pick)
        change = tl.load(table + (start + pick) * patches + place, mask=exists, other=-_INFINITY)
        if ADD:
            score = score + change
        else:
            score = tl.where((change < score) | (change != change), change, score)
        _, pick = _largest(score)
    candidate = tl.load(candidates + start + place, mask=exists, other=0) != 0
    tl.store(chosen + start + place, taken & candidate, mask=exists)


@triton.jit(do_not_specialize=["columns", "area", "apart"])
def farthest(distance, candidates, counts, chosen, patches, columns, area, apart, BLOCK: tl.constexpr):
    """Make picks, each the candidate farthest from what is kept; distances are squares, in whole numbers."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    exists = place < patches
    start = row * patches
    candidate = tl.load(candidates + start + place, mask=exists, other=0) != 0
    line = place % area // columns + apart * (place // area)
    gap = tl.where(candidate, tl.load(distance + start + place, mask=exists, other=-1), -1)
    taken = place < 0
    for _step in range(tl.load(counts + row)):
        pick = tl.argmax(gap, 0, tie_break_left=True)
        taken = taken | (place == pick)
        down = (line - (pick % area // columns + apart * (pick // area))).to(tl.int64)
        across = (place % columns - pick % columns).to(tl.int64)
        gap = tl.minimum(gap, down * down + across * across)
    tl.store(chosen + start + place, taken & candidate, mask=exists)


@triton.jit(do_not_specialize=["steps"])
def widen(
    table,
    volumes,
    candidates,
    counts,
    factors,
    chosen,
    patches,
    steps,
    NO_VOLUME: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make determinantal picks: each adds the most volume; its row of the Cholesky factor is kept in memory."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    exists = place < patches
    start = row * patches
    lines = factors + row * steps * patches
    volume = tl.load(volumes + start + place, mask=exists, other=-_INFINITY)
    adds = row >= 0
    taken = place < 0
    for step in range(tl.load(counts + row)):
        most, pick = _largest(volume)
        adds = adds & (most > NO_VOLUME) & (most < _INFINITY)
        taken = taken | ((place == pick) & adds)
        rest = tl.load(table + (start + pick) * patches + place, mask=exists, other=0.0)
        for begin in range(0, step, TILE):
            earlier = begin + tl.arange(0, TILE)
            line = lines + earlier * patches
            known = (earlier < step)[:, None] & exists[None, :]
            factor_rows = tl.load(line[:, None] + place[None, :], mask=known, other=0.0)
            of_pick = tl.load(line + pick, mask=earlier < step, other=0.0)
            rest = rest - tl.sum(factor_rows * of_pick[:, None], 0)
        factor = rest * tl.rsqrt(most)
        tl.store(lines + step * patches + place, factor, mask=exists)
        tl.debug_barrier()  # all threads of the program see the row
        volume = tl.where(exists, volume - factor * factor, -_INFINITY)
    candidate = tl.load(candidates + start + place, mask=exists, other=0) != 0
    tl.store(chosen + start + place, taken & candidate, mask=exists)


@triton.jit
def cover(
    table,
    columns,
    weights,
    candidates,
    counted,
    counts,
    changes,
    chosen,
    patches,
    rows,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Make the picks of SCOPE or MMTok: each has the largest product of weight and gain in coverage.

    A gain is a sum over rows, of which a step changes only those that its pick covers better. Sums of whole numbers,
    multiples of 1 / UNIT, do not depend on the order of the terms, so that equal patches stay equal.
    """
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    exists = place < patches
    start = image * patches
    item = tl.arange(0, ROWS)
    is_row = item < rows
    changes += image * 3 * rows  # row, coverage before and after, of those that changed
    candidate = tl.load(candidates + start + place, mask=exists, other=0) != 0
    weight = tl.load(weights + start + place, mask=exists, other=0.0)
    counts_here = tl.load(counted + image * rows + item, mask=is_row, other=0) != 0
    after = tl.zeros([ROWS], tl.int64)
    before = tl.where(counts_here, _ABOVE_ALL, after)  # no patch would add anything
    gain = tl.zeros([BLOCK], tl.int64)
    taken = place < 0
    for _step in range(tl.load(counts + image)):
        changed = before != after
        slot = tl.cumsum(changed.to(tl.int32), 0) - 1
        tl.store(changes + slot, item.to(tl.int64), mask=changed)
        tl.store(changes + rows + slot, before, mask=changed)
        tl.store(changes + 2 * rows + slot, after, mask=changed)
        tl.debug_barrier()
        length = tl.sum(changed.to(tl.int32), 0)
        for begin in range(0, length, TILE):
            entry = begin + tl.arange(0, TILE)
            listed = entry < length
            row = tl.load(changes + entry, mask=listed, other=0)
            was = tl.load(changes + rows + entry, mask=listed, other=0)[:, None]
            now = tl.load(changes + 2 * rows + entry, mask=listed, other=0)[:, None]
            line = columns + (image * rows + row) * patches
            read = listed[:, None] & exists[None, :]
            covers = (tl.load(line[:, None] + place[None, :], mask=read, other=0.0).to(tl.float64) * UNIT).to(tl.int64)
            gain += tl.sum((tl.maximum(covers, now) - now) - (tl.maximum(covers, was) - was), 0)
        value = tl.where(candidate & (taken == 0), (gain.to(tl.float64) / UNIT) * weight, -_INFINITY)
        _, pick = _largest(value)
        taken = taken | (place == pick)
        before = after
        reaches = tl.load(table + (start + pick) * rows + item, mask=is_row, other=0.0).to(tl.float64) * UNIT
        after = tl.where(counts_here, tl.maximum(before, reaches.to(tl.int64)), before)
        tl.debug_barrier()
    tl.store(chosen + start + place, taken & candidate, mask=exists)


@triton.jit(do_not_specialize=["most"])
def drop_alike(
    likeness,
    queues,
    lengths,
    wanted,
    odd,
    scores,
    chosen,
    patches,
    most,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the rounds of VisPruner: patches at even places of a queue are dropped until `wanted` ones are left."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    half = tl.arange(0, BLOCK // 2)
    start = row * patches
    left = tl.load(lengths + row)
    enough = tl.load(wanted + row)
    here = 2 * start  # of two queues the one that is read
    there = here + patches
    while left > enough:
        evens = (left + 1) // 2
        dropped = tl.minimum(tl.minimum(left - enough, most), evens)
        queue = tl.load(queues + here + place, mask=place < left, other=0)
        tl.store(odd + start + queue, (place % 2).to(tl.int8), mask=place < left)
        tl.debug_barrier()
        is_odd = tl.load(odd + start + place, mask=place < patches, other=0) != 0
        for begin in range(0, evens, TILE):
            entry = begin + tl.arange(0, TILE)
            listed = entry < evens
            patch = tl.load(queues + here + 2 * entry, mask=listed, other=0)
            line = likeness + (start + patch) * patches
            read = listed[:, None] & is_odd[None, :]
            values = tl.load(line[:, None] + place[None, :], mask=read, other=-1.5)
            values = tl.where(values != values, _INFINITY, values)
            tl.store(scores + start + entry, tl.max(values, 1), mask=listed)
        tl.debug_barrier()
        score = tl.load(scores + start + half, mask=half < evens, other=-_INFINITY)[None, :]
        for begin in range(0, evens, TILE):
            entry = begin + tl.arange(0, TILE)
            listed = entry < evens
            own = tl.load(scores + start + entry, mask=listed, other=0.0)[:, None]
            is_ahead = (score > own) | ((score == own) & (half[None, :] < entry[:, None]))
            rank = tl.sum(is_ahead.to(tl.int32), 1)
            patch = tl.load(queues + here + 2 * entry, mask=listed, other=0)
            tl.store(queues + there + rank - dropped, patch, mask=listed & (rank >= dropped))
        stays = half < left - evens
        odds = tl.load(queues + here + 2 * half + 1, mask=stays, other=0)
        tl.store(queues + there + evens - dropped + half, odds, mask=stays)
        left -= dropped
        here, there = there, here
        tl.debug_barrier()
    rest = tl.load(queues + here + place, mask=place < left, other=0)
    tl.store(chosen + start + rest, place < left, mask=place < left)


KERNELS = {kernel.__name__: kernel for kernel in (cover, drop_alike, farthest, follow, widen)}

__all__ = ["KERNELS"]
