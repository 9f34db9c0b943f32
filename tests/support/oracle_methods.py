"""The methods to compare with as plain loops in float64: one tile at a time, from their definitions, no torch.

`method_oracles` gives what `recover_tokens` must return, and `gap`: how near the closest decision was to a tie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from oracle import cosine, softmax, top
from oracle_budgets import tile_budgets
from oracle_tile import Array, Choice, Tile

OPTIONS: dict[str, dict[str, Any]] = {
    "prumerge": {"neighbors": 32},
    "prumerge_plus": {"neighbors": 32, "uniform_share": 0.5},
    "visionzip": {"contextual_share": 10 / 64, "class_token": True},
    "trim": {"similarity": "dot"},
    "vispruner": {"important_share": 0.5, "step": 8},
    "holov": {"crops": 16},
    "hiprune": {"anchor_share": 0.1, "object_layer": None},
    "mmtok": {"alpha": 0.5, "text_temperature": 0.02, "visual_temperature": 0.2},
}
"""Options of each method and what they are when they are not given."""


# ---- budgets -------------------------------------------------------------------------------------------------------


def outlier_count(tile: Tile, scores: Sequence[float]) -> int:
    """How many scores are above Q3 + 1.5 (Q3 - Q1); at least 1."""
    first, third = np.quantile(np.array(scores, dtype=np.float64), [0.25, 0.75])
    threshold = float(third + 1.5 * (third - first))
    for score in scores:
        tile.note(float(score), threshold, scale=abs(threshold))
    return max(1, sum(float(score) > threshold for score in scores))


def visual(tile: Tile, k: int | None) -> Choice:
    """FasterVLM: the most salient patches."""
    assert k is not None
    return Choice(visual=top(tile.patches, tile.a, k))


def centres_of_prumerge(tile: Tile, k: int | None) -> list[int]:
    """The outliers, or all but one of the budget's tokens."""
    n = outlier_count(tile, [tile.a[j] for j in tile.patches]) if k is None else max(1, k - 1)
    return top(tile.patches, tile.a, n)


def centres_of_prumerge_plus(tile: Tile, k: int | None) -> list[int]:
    """Salient patches and evenly spread ones."""
    if k is None:
        salient = centres_of_prumerge(tile, None)
        step = max(1, int(int(len(tile.patches) / len(salient)) / 3))
        return salient + [j for j in tile.patches[:-1][::step] if j not in salient]
    n = max(1, k - 1)
    uniform = math.floor(tile.options["uniform_share"] * n)
    salient = top(tile.patches, tile.a, n - uniform)
    rest = [j for j in tile.patches if j not in salient]
    return salient + [rest[(2 * i + 1) * len(rest) // (2 * uniform)] for i in range(uniform)]


def merge_around(tile: Tile, centres: list[int], k: int | None) -> Choice:
    """PruMerge's tokens: each centre with its neighbours added, and every other patch in one more token."""
    merged = []
    for i in centres if tile.compact else sorted(centres):
        others = [j for j in tile.patches if j != i]
        near = {j: cosine(tile.keys[i], tile.keys[j]) for j in others}
        token = tile.h[i].copy()
        for j in tile.top_noted(others, near, tile.options["neighbors"]):
            token += float(tile.a[j]) * tile.h[j]
        merged.append((i, token, [i]))
    rest = [j for j in tile.patches if j not in centres]
    if rest and k != 1:
        place = top(rest, tile.a, 1)[0]
        merged.append((place, np.sum([float(tile.a[j]) * tile.h[j] for j in rest], axis=0), [place]))
    return Choice(merged=merged)


def visionzip(tile: Tile, k: int | None) -> Choice:
    """VisionZip: class token, salient patches, and contextual tokens around evenly placed targets among the rest."""
    assert k is not None
    contextual = min(math.floor(tile.options["contextual_share"] * k), k - 1)
    leading = [tile.class_state] if tile.options["class_token"] and tile.compact else []
    dominant = top(tile.patches, tile.a, k - contextual - len(leading))
    rest = [j for j in tile.patches if j not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[i * step] for i in range(contextual)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    means = {j: tile.keys[j].reshape(tile.num_heads, -1).mean(0) for j in rest}
    for j in rest:
        if targets and j not in targets:
            near = {target: cosine(means[j], means[target]) for target in targets}
            joined[tile.top_noted(targets, near, 1)[0]].append(j)
    merged = []
    for target in targets:
        token = tile.h[target].copy()
        if joined[target]:
            token += np.mean([tile.h[j] for j in joined[target]], axis=0)
        merged.append((target, token, [target, *joined[target]]))
    return Choice(visual=dominant, merged=merged, leading=leading)


def vispruner(tile: Tile, k: int | None) -> Choice:
    """VisPruner: salient patches, and of the rest those that are left when near duplicates are dropped."""
    assert k is not None
    important = top(tile.patches, tile.a, min(math.floor(tile.options["important_share"] * k), k - 1))
    order = top(tile.patches, tile.a, len(tile.patches))
    alive, wanted = [j for j in order if j not in important], k - len(important)
    while len(alive) > wanted:
        even, odd = alive[0::2], alive[1::2]
        score = {i: max([cosine(tile.h[i], tile.h[j]) for j in odd], default=-1.5) for i in even}
        falling = sorted(even, key=lambda i: -score[i])
        for left, right in itertools.pairwise(falling):
            tile.note(score[left], score[right])
        alive = falling[min(tile.options["step"], len(alive) - wanted, len(even)) :] + odd
    return Choice(visual=important, coverage=alive)


# ---- choices by the question and by the projected features ---------------------------------------------------------


def trim(tile: Tile, k: int | None) -> Choice:
    """TRIM: the most relevant patches, and the mean of the others."""
    assert tile.s is not None
    relevance = softmax([float(tile.s[j]) for j in tile.patches])
    n = outlier_count(tile, relevance) if k is None else max(1, k - 1)
    kept = top(tile.patches, tile.s, n)
    dropped = [j for j in tile.patches if j not in kept]
    if not dropped or k == 1:
        return Choice(text=kept)
    mean = np.mean([tile.h[j] for j in dropped], axis=0)
    return Choice(text=kept, merged=[(top(dropped, tile.a, 1)[0], mean, dropped)])


def divprune(tile: Tile, k: int | None) -> Choice:
    """DivPrune: each patch is the one farthest from those chosen before it."""
    assert tile.p is not None
    assert k is not None
    patches = tile.patches
    distance = {i: {j: 1.0 - cosine(tile.p[i], tile.p[j]) for j in patches if j != i} for i in patches}
    chosen: list[int] = []
    while len(chosen) < k:
        free = [i for i in patches if i not in chosen]
        nearest = {i: min(gap for j, gap in distance[i].items() if j in chosen or not chosen) for i in free}
        chosen += tile.top_noted(free, nearest, 1)
    return Choice(coverage=chosen)


def cdpruner(tile: Tile, k: int | None) -> Choice:
    """CDPruner: greedy inference of a determinantal point process over relevant and different patches."""
    assert tile.s is not None
    assert tile.p is not None
    assert k is not None
    scores = [float(tile.s[j]) for j in tile.patches]
    low, high = min(scores), max(scores)
    r = {j: (float(tile.s[j]) - low + 1e-6) / (high - low + 1e-6) for j in tile.patches}
    d = {j: r[j] * r[j] for j in tile.patches}  # the cosine of a patch with itself is 1
    c: dict[int, list[float]] = {j: [] for j in tile.patches}
    chosen: list[int] = []
    while len(chosen) < k:
        free = [i for i in tile.patches if i not in chosen]
        best = top(free, d, 1)[0]
        tile.note(d[best], 1e-9, scale=1e-9)
        if d[best] <= 1e-9:
            chosen += tile.top_noted(free, r, k - len(chosen))
            break
        for i in free:
            tile.note(d[best], d[i], scale=d[best])
        chosen.append(best)
        for i in free:
            if i != best:
                kernel = r[best] * cosine(tile.p[best], tile.p[i]) * r[i]
                e = (kernel - math.fsum(x * y for x, y in zip(c[best], c[i], strict=True))) / math.sqrt(d[best])
                d[i] -= e * e
                c[i].append(e)
    return Choice(text=chosen)


def scope(tile: Tile, k: int | None) -> Choice:
    """SCOPE: each patch is the one with the largest product of saliency and gain in coverage."""
    assert k is not None
    patches = tile.patches
    cos: dict[int, dict[int, float]] = {i: {} for i in patches}
    for i in patches:
        for j in patches[: patches.index(i) + 1]:
            cos[i][j] = cos[j][i] = cosine(tile.h[i], tile.h[j])
    covered, chosen = dict.fromkeys(patches, 0.0), []
    while len(chosen) < k:
        free = [j for j in patches if j not in chosen]
        gain = {j: math.fsum(max(0.0, cos[i][j] - covered[i]) for i in patches) * float(tile.a[j]) for j in free}
        order = top(free, gain, 2)
        if len(order) == 2:
            tile.note(gain[order[0]], gain[order[1]], scale=gain[order[0]])
        chosen.append(order[0])
        covered = {i: max(covered[i], cos[i][order[0]]) for i in patches}
    return Choice(coverage=chosen)


def crops_of(patches: list[int], number: int) -> list[list[int]]:
    """HoloV's crops: runs of patches, the first ones longer by one where the number does not divide."""
    crops, start = [], 0
    for index in range(number):
        size = len(patches) // number + (index < len(patches) % number)
        crops.append(patches[start : start + size])
        start += size
    return [crop for crop in crops if crop]


def holov(tile: Tile, k: int | None) -> Choice:
    """HoloV: crops share the budget by their mean attention, and keep their most salient patches."""
    assert k is not None
    crops = crops_of(tile.patches, tile.options["crops"])
    scores = []
    for crop in crops:
        mean = sum((Fraction(float(tile.a[j])) for j in crop), Fraction(0)) / len(crop)
        scores.append(mean * (Fraction(1000) * Fraction("1.09") if len(crop) > 1 else 1))
    exact = [score / (sum(scores) + Fraction(1, 10**6)) * k for score in scores]
    tokens = [math.floor(share) for share in exact]
    for share in exact:
        tile.note(float(abs(share - round(share))), 0.0, scale=1e-6)  # rounding is far below 1e-12
    by_share = sorted(range(len(crops)), key=lambda index: (-exact[index], index))
    for index in by_share[: k - sum(tokens)]:
        tokens[index] += 1
    if 0 < k - sum(math.floor(share) for share in exact) < len(crops):
        last, following = (float(exact[by_share[k - sum(map(math.floor, exact)) - shift]]) for shift in (1, 0))
        tile.note(last, following, scale=last or 1.0)
    kept = [j for crop, count in zip(crops, tokens, strict=True) for j in top(crop, tile.a, count)]
    return Choice(visual=kept + top([j for j in tile.patches if j not in kept], tile.a, k - len(kept)))


def hiprune(tile: Tile, k: int | None) -> Choice:
    """HiPrune: anchors of the middle block with their neighbours, and registers of the deep one."""
    assert tile.received is not None
    assert k is not None
    middle, deep = tile.received
    last, columns = len(tile.h) - 1, tile.columns
    number = min(round(k * tile.options["anchor_share"] / 5), k // 5)
    kept = anchors = top(tile.patches, middle, number)
    for shift in (-1, 1, -columns, columns):
        kept = kept + [min(max(j + shift, 0), last) for j in anchors]
    kept = sorted(set(kept) & set(tile.patches))
    return Choice(visual=kept + top([j for j in tile.patches if j not in kept], deep, k - len(kept)))


def mmtok(tile: Tile, k: int | None) -> Choice:
    """MMTok: each patch is the one that adds most to how well all words and all patches are covered."""
    assert tile.words is not None
    assert k is not None
    patches = tile.patches
    words = [row for row in tile.words if math.isfinite(row[patches[0]])]
    rows = []
    for row in words:
        share = softmax([float(row[j]) / tile.options["text_temperature"] for j in patches])
        rows.append({j: p / len(words) for j, p in zip(patches, share, strict=True)})
    for i in patches:
        share = softmax([cosine(tile.h[i], tile.h[j]) / tile.options["visual_temperature"] for j in patches])
        rows.append({j: tile.options["alpha"] * q / len(patches) for j, q in zip(patches, share, strict=True)})
    covered, chosen = [0.0] * len(rows), []
    while len(chosen) < k:
        free = [j for j in patches if j not in chosen]
        gain = {j: math.fsum(max(row[j] - best, 0.0) for row, best in zip(rows, covered, strict=True)) for j in free}
        order = top(free, gain, 2)
        if len(order) == 2:
            tile.note(gain[order[0]], gain[order[1]], scale=gain[order[0]])
        chosen.append(order[0])
        covered = [max(row[order[0]], best) for row, best in zip(rows, covered, strict=True)]
    return Choice(coverage=chosen)


METHODS: dict[str, Callable[[Tile, int | None], Choice]] = {
    "visual": visual,
    "prumerge": lambda tile, k: merge_around(tile, centres_of_prumerge(tile, k), k),
    "prumerge_plus": lambda tile, k: merge_around(tile, centres_of_prumerge_plus(tile, k), k),
    "visionzip": visionzip,
    "trim": trim,
    "vispruner": vispruner,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "scope": scope,
    "holov": holov,
    "hiprune": hiprune,
    "mmtok": mmtok,
}


# ---- the whole output ----------------------------------------------------------------------------------------------


def choose(method: str, tile: Tile, k: int | None) -> Choice:
    """The method's choice of `k` tokens (`None`: as many as it likes); a budget for all patches keeps them."""
    if not tile.patches or k == 0:
        return Choice()
    if k is not None and k >= len(tile.patches):
        return Choice(visual=list(tile.patches))
    return METHODS[method](tile, k)


def as_output(tile: Tile, choice: Choice) -> dict[str, Any]:
    """The fields of `TokenRecoveryOutput` for one row, unpadded."""
    n, kept = len(tile.h), sorted(choice.visual + choice.text + choice.coverage)
    assert len(set(kept)) == len(kept)
    cluster, leads = [-1] * n, len(choice.leading)
    for place, j in enumerate(kept):
        cluster[j] = leads + place
    for slot, (_, _, members) in enumerate(choice.merged):
        for j in members:
            cluster[j] = leads + len(kept) + slot
    places = [-1] * leads + kept + [place for place, _, _ in choice.merged]
    tokens = [*choice.leading, *(tile.h[j] for j in kept), *(token for _, token, _ in choice.merged)]

    def mask(members: Sequence[int]) -> list[bool]:
        return [j in members for j in range(n)]

    return {
        "tokens": np.array(tokens).reshape(len(places), tile.h.shape[1]),
        "counts": len(places),
        "visual_mask": mask(choice.visual),
        "text_mask": mask(choice.text),
        "coverage_mask": mask(choice.coverage),
        "centre_mask": mask([place for place, _, _ in choice.merged]),
        "cluster": cluster,
        "places": places,
        "leading": leads,
        "gap": min(tile.gaps, default=math.inf),
    }


def method_oracles(
    h: Array,
    keys: Array,
    saliency: Array,
    s: Array | None,
    config: Any,
    *,
    num_heads: int = 1,
    valid: Array | None = None,
    tiles: Sequence[int] | None = None,
    projected: Array | None = None,
    received: Array | None = None,
    class_state: Array | None = None,
    words: Array | None = None,
) -> list[dict[str, Any]]:
    """Every row's output: `h` (B, N, C), `keys` (B, N + 1, C), `saliency` and `s` (B, N), and so on."""
    rows, n = h.shape[:2]
    valid = np.ones((rows, n), dtype=bool) if valid is None else valid
    outputs: list[dict[str, Any]] = []
    for size in [1] * rows if tiles is None else tiles:
        counts = [int(valid[b].sum()) for b in range(len(outputs), len(outputs) + size)]
        for k in [None] * size if config.budget is None else tile_budgets(config.budget, counts):
            row = len(outputs)
            tile = Tile(
                h=h[row],
                keys=keys[row, 1:],
                a=saliency[row],
                s=None if s is None else s[row],
                p=None if projected is None else projected[row],
                received=None if received is None else received[row],
                columns=math.isqrt(n) if math.isqrt(n) ** 2 == n else n,
                patches=[j for j in range(n) if valid[row, j]],
                num_heads=num_heads,
                options={**OPTIONS.get(config.method, {}), **config.method_options},
                compact=config.position_ids != "original",
                class_state=None if class_state is None else class_state[row],
                words=None if words is None else words[row],
            )
            outputs.append(as_output(tile, choose(config.method, tile, k)))
    return outputs
