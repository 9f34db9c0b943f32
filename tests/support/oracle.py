"""The method as plain loops in float64: one image at a time, no vectorisation, no torch.

The tests compare the package's vectorised code with what is written here. `config` is anything with the attributes of
`TokenRecoveryConfig` that the method reads.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def nearest_window(ordered: Sequence[float], place: int, count: int) -> list[int]:
    """The `count` places of `ordered` (ascending) nearest to `place`, the left one first on equal distance."""
    left, right, chosen = place - 1, place + 1, []
    while len(chosen) < count:
        to_left = ordered[place] - ordered[left] if left >= 0 else math.inf
        to_right = ordered[right] - ordered[place] if right < len(ordered) else math.inf
        if to_left <= to_right:
            chosen.append(left)
            left -= 1
        else:
            chosen.append(right)
            right += 1
    return chosen


def lof_oracle(values: Iterable[float], k: int) -> list[float]:
    """Local outlier factor of every value, in the order given (Breunig et al. 2000; scikit-learn's 1e-10)."""
    values = [float(value) for value in values]
    n, k = len(values), min(k, len(values) - 1)
    if n <= 1:
        return [1.0] * n
    order = sorted(range(n), key=lambda i: values[i])
    ordered = [values[i] for i in order]
    near = [nearest_window(ordered, p, k) for p in range(n)]
    radius = [max(abs(ordered[o] - ordered[p]) for o in near[p]) for p in range(n)]
    density = []
    for p in range(n):
        reach = [max(abs(ordered[o] - ordered[p]), radius[o]) for o in near[p]]
        density.append(1.0 / (math.fsum(reach) / k + 1e-10))
    factors = [0.0] * n
    for p in range(n):
        factors[order[p]] = math.fsum(density[o] for o in near[p]) / k / density[p]
    return factors


def upper_outliers(indices: Sequence[int], scores: Array, k: int, threshold: float) -> list[int]:
    """Those of `indices` whose score is an outlier among theirs and above their median."""
    if not indices:
        return []
    row = [float(scores[j]) for j in indices]
    median = statistics.median(row)
    return [
        j for j, value, lof in zip(indices, row, lof_oracle(row, k), strict=True) if lof > threshold and value > median
    ]


def top(indices: Sequence[int], scores: Array, count: int) -> list[int]:
    """The `count` of `indices` with the largest scores, the lower index first on equal scores."""
    return sorted(indices, key=lambda j: (-float(scores[j]), j))[:count]


def softmax(logits: Sequence[float]) -> list[float]:
    """Softmax of a list of floats."""
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def saliency_oracle(q: Array, keys: Array, valid: Sequence[bool], num_heads: int = 1) -> Array:
    """Attention of the class query `q` (C,) to `keys` (N + 1, C), mean of heads; (N,) float32, 0 where invalid."""
    n, width = len(keys) - 1, len(q) // num_heads
    total = [0.0] * n
    places = [0] + [j + 1 for j in range(n) if valid[j]]
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        logits = [float(np.dot(q[part], keys[p][part])) / math.sqrt(width) for p in places]
        for p, share in zip(places[1:], softmax(logits)[1:], strict=True):
            total[p - 1] += share / num_heads
    return np.array(total, dtype=np.float64).astype(np.float32)


def farthest_points(kept: Iterable[int], free: Iterable[int], count: int, columns: int) -> list[int]:
    """Choose `count` of `free`, each time the one farthest from everything kept; the lower raster index on a tie."""
    kept, free, chosen = list(kept), sorted(free), []
    for _ in range(count):
        best, best_distance = free[0], -1.0
        for j in free:
            gaps = [(j // columns - i // columns) ** 2 + (j % columns - i % columns) ** 2 for i in kept]
            distance = min(gaps) if gaps else math.inf
            if distance > best_distance:
                best, best_distance = j, distance
        kept.append(best)
        chosen.append(best)
        free.remove(best)
    return chosen


def herding(h: Array, patches: Sequence[int], free: Iterable[int], count: int) -> list[int]:
    """Choose `count` of `free`, each time the one that brings the mean direction of the chosen nearest to the mean."""
    lengths = {j: math.sqrt(float(np.dot(h[j], h[j]))) for j in patches}
    unit = {j: h[j] / (lengths[j] or 1) for j in patches}
    mean = sum(unit.values()) / len(patches)
    free, chosen = sorted(free), []
    for step in range(1, min(count, len(free)) + 1):
        total = sum((unit[j] for j in chosen), np.zeros(h.shape[1]))
        gaps = [float(np.sum((mean * step - total - unit[j]) ** 2)) for j in free]
        best = free[int(np.argmin(gaps))]
        chosen.append(best)
        free.remove(best)
    return chosen


def budget_split(config: Any, n: int, has_text: bool) -> tuple[int, int, int, int]:
    """How many visual, text, coverage and merged tokens a fixed budget gives to an image of `n` patches."""
    total = config.budget
    if isinstance(total, float):
        total = min(n, max(1, math.floor(total * n + 0.5)))
    merged = 0 if total >= n else min(config.merged_tokens, total - 1)
    coverage = math.floor(config.coverage_share * (total - merged))
    text = math.floor(config.text_share * (total - merged - coverage)) if has_text else 0
    return total - merged - coverage - text, text, coverage, merged


def limited(config: Any, s: Array | None, n: int, rest: list[int], n_text: int, n_coverage: int) -> tuple[int, int]:
    """Numbers of text and coverage tokens once text recovery takes outliers only, if it is to."""
    if s is None or config.text_limit == "share":
        return n_text, n_coverage
    found = len(upper_outliers(rest, s, config.outlier_neighbors, config.outlier_threshold))
    if config.text_limit != "outliers":
        found //= 2
    if config.text_limit == "half_or_few":
        found = max(found, math.floor(0.02 * n + 0.5))
    found = min(n_text, found)
    return found, n_coverage + n_text - found


def unlike_each_other(h: Array, s: Array, rest: list[int], count: int) -> list[int]:
    """Greedily those of `rest` that span the largest volume: relevance_j * unit_j, made orthogonal."""
    low, high = min(float(s[j]) for j in rest), max(float(s[j]) for j in rest)
    rows = {}
    for j in rest:
        length = math.sqrt(float(np.dot(h[j], h[j])))
        rows[j] = h[j] / (length or 1) * ((float(s[j]) - low + 1e-6) / (high - low + 1e-6))
    chosen: list[int] = []
    left = dict(rows)  # the part of every row that is at right angles to the chosen ones
    while len(chosen) < count:
        free = [j for j in rest if j not in chosen]
        volume = {j: float(np.dot(left[j], left[j])) for j in free}
        best = max(free, key=lambda j: (volume[j], -j))
        if volume[best] <= 1e-9:
            return chosen + top(free, s, count - len(chosen))
        chosen.append(best)
        axis = left[best] / math.sqrt(volume[best])
        left = {j: row - np.dot(row, axis) * axis for j, row in left.items()}
    return chosen


def text_patches(h: Array, s: Array | None, rest: list[int], count: int, config: Any) -> list[int]:
    """The question's patches of a fixed budget."""
    if s is None or not rest:
        return []
    return unlike_each_other(h, s, rest, count) if config.text_by == "diversity" else top(rest, s, count)


def dynamic_stages(a: Array, s: Array | None, patches: list[int], config: Any) -> tuple[list[int], ...]:
    """Visual, text and coverage patches and merge centres, their numbers counted by outliers."""
    k, threshold = config.outlier_neighbors, config.outlier_threshold
    visual = top(patches, a, len(upper_outliers(patches, a, k, threshold)))
    rest = [j for j in patches if j not in visual]
    text = [] if s is None else top(rest, s, len(upper_outliers(rest, s, k, threshold)))
    rest = [j for j in rest if j not in text]
    centres = upper_outliers(rest, a, config.merge_neighbors, threshold) or top(rest, a, 1)
    return visual, text, [], centres


def budget_stages(
    a: Array, s: Array | None, h: Array, patches: list[int], config: Any, columns: int
) -> tuple[list[int], ...]:
    """Visual, text and coverage patches and merge centres of a fixed budget."""
    n_visual, n_text, n_coverage, n_merged = budget_split(config, len(patches), s is not None)
    visual = top(patches, a, n_visual)
    rest = [j for j in patches if j not in visual]
    n_text, n_coverage = limited(config, s, len(patches), rest, n_text, n_coverage)
    text = text_patches(h, s, rest, n_text, config)
    rest = [j for j in rest if j not in text]
    if config.coverage_by == "content":
        coverage = herding(h, patches, rest, n_coverage)
    else:
        coverage = farthest_points(visual + text, rest, n_coverage, columns) if n_coverage else []
    rest = [j for j in rest if j not in coverage]
    return visual, text, coverage, top(rest, a, n_merged)


def cosine(left: Array, right: Array) -> float:
    """Cosine of two vectors; 0 with a zero vector."""
    norms = math.sqrt(float(np.dot(left, left))) * math.sqrt(float(np.dot(right, right)))
    return float(np.dot(left, right)) / norms if norms else 0.0


def nearest_centre(j: int, centres: Sequence[int], keys: Array) -> int:
    """The centre whose patch key has the largest cosine with that of patch `j`, the lower index on a tie."""
    return min(centres, key=lambda c: (-cosine(keys[j + 1], keys[c + 1]), c))


def merge(members: Sequence[int], h: Array, a: Array) -> Array:
    """Mean of the members' features, weighted by saliency (their plain mean where all saliency underflowed)."""
    weights = [float(a[j]) for j in members]
    if not math.fsum(weights):
        weights = [1.0] * len(members)
    total = np.zeros(h.shape[1])
    for weight, j in zip(weights, members, strict=True):
        total += weight * h[j]
    return total / math.fsum(weights)


def recover_oracle(
    h: Array,
    q: Array,
    keys: Array,
    s: Array | None,
    config: Any,
    *,
    num_heads: int = 1,
    grid: tuple[int, int] | None = None,
    valid: Sequence[bool] | None = None,
    saliency: Array | None = None,
) -> dict[str, Any]:
    """One image: `h` (N, C), `q` (C,), `keys` (N + 1, C), `s` (N,) or None. Returns TokenRecoveryOutput unpadded.

    `saliency` (N,) replaces the oracle's own, so that the stages after it can be compared to the last bit.
    """
    h, q, keys = (np.asarray(x, dtype=np.float64) for x in (h, q, keys))
    n = len(h)
    valid = [True] * n if valid is None else [bool(v) for v in valid]
    patches = [j for j in range(n) if valid[j]]
    if saliency is None:
        saliency = saliency_oracle(q, keys, valid, num_heads if config.visual_heads == "mean" else 1)
    if config.budget is None:
        visual, text, coverage, centres = dynamic_stages(saliency, s, patches, config)
    else:
        columns = grid[1] if grid else math.isqrt(n)
        visual, text, coverage, centres = budget_stages(saliency, s, h, patches, config, columns)
    kept, centres = sorted(visual + text + coverage), sorted(centres)
    places = kept + centres
    cluster = [-1] * n
    for place, j in enumerate(places):
        cluster[j] = place
    for j in patches:
        if cluster[j] < 0 and centres:
            cluster[j] = len(kept) + centres.index(nearest_centre(j, centres, keys))
    tokens = [h[j] for j in kept]
    tokens += [merge([j for j in patches if cluster[j] == cluster[c]], h, saliency) for c in centres]

    def mask(members: Sequence[int]) -> list[bool]:
        return [j in members for j in range(n)]

    return {
        "tokens": np.array(tokens).reshape(len(places), h.shape[1]),
        "counts": len(places),
        "visual_mask": mask(visual),
        "text_mask": mask(text),
        "coverage_mask": mask(coverage),
        "centre_mask": mask(centres),
        "cluster": cluster,
        "places": places,
        "saliency": saliency,
    }
