"""The plain loops of oracle_methods.py give what the papers define, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
from oracle_budgets import tile_budgets
from oracle_methods import Tile, choose, crops_of


def tile(a, keys=None, h=None, p=None, s=None, heads=1, **options):
    """One tile for the oracle, its features one-hot if they are not given."""
    n = len(a)
    h = np.eye(n) if h is None else h
    received, columns, compact = options.pop("received", None), options.pop("columns", n), options.pop("compact", True)
    keys, patches = np.array(keys or np.eye(n)), list(range(n))
    return Tile(h, keys, np.array(a), s, p, received, columns, patches, heads, options, compact, np.full(len(h[0]), 7))


def on_circle(*degrees):
    return np.array([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def test_oracle_shares_a_budget_by_largest_remainder():
    assert tile_budgets(10, [10, 10, 10]) == [4, 3, 3]
    assert tile_budgets(7, [5, 3, 2]) == [4, 2, 1]
    assert tile_budgets(2, [1, 1, 1]) == [1, 1, 0]
    assert tile_budgets(1, [1, 4, 4]) == [0, 1, 0]
    assert tile_budgets(100, [3, 4]) == [3, 4]
    assert tile_budgets(0.25, [6, 1]) == [2, 0]  # 1.75 tokens, rounded half up
    assert tile_budgets(0.01, [6, 6]) == [1, 0]


def test_oracle_prumerge_by_hand():
    a, keys = [0.5, 0.1, 0.3, 0.1], [[1, 0], [1, 0.1], [0, 1], [0.1, 1]]
    choice = choose("prumerge", tile(a, keys, neighbors=1), 3)
    tokens = [[1, 0.1, 0, 0], [0, 0, 1, 0.1], [0, 0.1, 0, 0.1]]
    np.testing.assert_allclose([token for _, token, _ in choice.merged], tokens)
    assert [place for place, _, _ in choice.merged] == [0, 2, 1]
    assert [members for _, _, members in choice.merged] == [[0], [2], [1]]
    ((place, token, _),) = choose("prumerge", tile(a, keys, neighbors=2), 1).merged
    assert place == 0
    np.testing.assert_allclose(token, [1, 0.1, 0, 0.1])


def test_oracle_prumerge_plus_by_hand():
    def places(k, **options):
        choice = choose("prumerge_plus", tile([6, 5, 4, 3, 2, 1], neighbors=1, **options), k)
        return [place for place, _, _ in choice.merged]

    assert places(5, uniform_share=0.5) == [0, 1, 3, 5, 2]
    assert places(5, uniform_share=0.0) == [0, 1, 2, 3, 4]
    assert places(4, uniform_share=1.0) == [1, 3, 5, 0]
    a = [1.0] * 14
    a[4], a[13] = 8, 9
    choice = choose("prumerge_plus", tile(a, neighbors=1), None)
    # Two of 14 are outliers, so every second patch is a centre besides; the extra token stands at 1.
    assert [place for place, _, _ in choice.merged] == [13, 4, 0, 2, 6, 8, 10, 12, 1]
    # Never the last patch: every one of the others is a centre.
    choice = choose("prumerge_plus", tile([1, 1, 1, 1, 9, 1, 1, 1], neighbors=1), None)
    assert [place for place, _, _ in choice.merged] == [4, 0, 2, 6, 1]


def test_oracle_visionzip_by_hand():
    keys = [[9, 9], [9, 9], [1, 0], [0, 2], [0, 1], [1, 3]]
    a, plain = [6, 5, 4, 3, 2, 1], {"contextual_share": 0.5, "class_token": False}
    choice = choose("visionzip", tile(a, keys, **plain), 4)
    assert (choice.visual, choice.leading) == ([0, 1], [])
    assert [members for _, _, members in choice.merged] == [[2], [4, 3, 5]]
    np.testing.assert_allclose([token for _, token, _ in choice.merged], [np.eye(6)[2], [0, 0, 0, 0.5, 1, 0.5]])
    # With two heads, keys are compared by their mean: all the same here, so the first target takes everything.
    choice = choose("visionzip", tile(a, keys, heads=2, **plain), 4)
    assert [members for _, _, members in choice.merged] == [[2, 3, 5], [4]]
    # The class token takes the place of a patch: 1 is no longer kept, and a target.
    choice = choose("visionzip", tile(a, keys, contextual_share=0.5, class_token=True), 4)
    assert choice.visual == [0]
    assert [token.tolist() for token in choice.leading] == [[7] * 6]
    assert [members for _, _, members in choice.merged] == [[1, 2], [3, 4, 5]]
    choice = choose("visionzip", tile(a, keys, contextual_share=0.5, class_token=True, compact=False), 4)
    assert (choice.visual, choice.leading) == ([0, 1], [])


def test_oracle_vispruner_by_hand():
    h = on_circle(0, 10, 90, 200, 205)
    # 4 is like 3 and goes first, then 0, which is like 1; the odd places come last.
    assert choose("vispruner", tile([1] * 5, h=h, important_share=0.0, step=1), 4).coverage == [0, 2, 1, 3]
    assert choose("vispruner", tile([1] * 5, h=h, important_share=0.0, step=2), 3).coverage == [2, 1, 3]
    # In falling attention the queue is 3, 4, 2, 1, 0.
    falling = tile([1, 2, 3, 5, 4], h=h, important_share=0.0, step=1)
    assert choose("vispruner", falling, 4).coverage == [0, 2, 4, 1]
    choice = choose("vispruner", tile([1, 1, 1, 1, 2], h=h, important_share=1.0, step=1), 2)
    assert (choice.visual, choice.coverage) == ([4], [1])


def test_oracle_trim_by_hand():
    choice = choose("trim", tile([1, 3, 2, 3], s=np.array([2.0, 5, 3, 4])), 3)
    assert choice.text == [1, 3]
    ((place, token, members),) = choice.merged
    assert (place, members) == (2, [0, 2])
    np.testing.assert_allclose(token, [0.5, 0, 0.5, 0])
    assert choose("trim", tile([1, 1, 1, 1], s=np.array([0.0, 0, 9, 0])), None).text == [2]


def test_oracle_divprune_by_hand():
    p = on_circle(0, 10, 90, 180)
    assert choose("divprune", tile([1] * 4, p=p), 3).coverage == [3, 0, 2]
    assert choose("divprune", tile([1] * 2, p=p[:2]), 1).coverage == [0]  # equally far from each other


def test_oracle_cdpruner_maximises_the_determinant_at_every_step():
    rng = np.random.default_rng(0)
    p, s = rng.normal(size=(14, 8)), rng.uniform(0.1, 0.4, 14)
    chosen = choose("cdpruner", tile([1] * 14, p=p, s=s), 10).text
    r = (s - s.min() + 1e-6) / (s.max() - s.min() + 1e-6)
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    kernel = np.outer(r, r) * (unit @ unit.T)
    for step in range(8):  # as many as the features are wide
        volumes = {
            j: np.linalg.det(kernel[np.ix_([*chosen[:step], j], [*chosen[:step], j])])
            for j in range(14)
            if j not in chosen[:step]
        }
        assert max(volumes, key=volumes.get) == chosen[step]
    left = [j for j in range(14) if j not in chosen[:8]]
    assert chosen[8:] == sorted(left, key=lambda j: -r[j])[:2]


def test_oracle_scope_by_hand():
    h = on_circle(0, 60, 90, 180)
    # The sum of each patch's positive cosines is 1.5, 1 + .5 + .866, 1 + .866 and 1: the second is taken first.
    assert choose("scope", tile([1, 1, 1, 1], h=h), 1).coverage == [1]
    # Then the gains are .5 (cosine 1 against .5), 0, .134, and 1.
    assert choose("scope", tile([1, 1, 1, 1], h=h), 3).coverage == [1, 3, 0]
    assert choose("scope", tile([2, 1, 5, 1], h=h), 3).coverage == [2, 0, 3]
    assert choose("scope", tile([0, 0, 0, 0], h=h), 2).coverage == [0, 1]


def test_oracle_holov_by_hand():
    assert crops_of([2, 3, 5, 8, 9], 3) == [[2, 3], [5, 8], [9]]
    assert crops_of([2, 3], 3) == [[2], [3]]
    a = [3, 1, 4, 2, 8, 2]  # means 2, 3 and 5: of two tokens 0.4, 0.6 and almost 1
    assert choose("holov", tile(a, crops=3), 2).visual == [2, 4]
    assert choose("holov", tile(a, crops=3), 3).visual == [2, 4, 5]
    assert choose("holov", tile(a, crops=3), 5).visual == [2, 3, 4, 5, 0]  # almost 1, 1.5 and 2.5: 0, 2, 3
    assert choose("holov", tile([0.1, 0.1, 9.7, 0.1], crops=2), 3).visual == [2, 3, 0]  # no third patch in its crop
    assert choose("holov", tile([1, 1, 9], crops=2), 1).visual == [0]  # a crop of one patch has 1 / 1090 of the score


def published_scores_of_holov(a, p, crops):
    """Every crop's score as in the paper, with the variance of similarities inside the crop."""
    scores = []
    for crop in crops:
        unit = p[crop] / (np.linalg.norm(p[crop], axis=1, keepdims=True) + 1e-6)
        similarity = unit @ unit.T * (1 - np.eye(len(crop)))
        mean = similarity.sum(1, keepdims=True) / (len(crop) - 1)
        variance = ((similarity - mean) ** 2).sum(1) / (len(crop) - 1)
        attention = 1e3 * a[crop]
        scores.append((attention + 0.09 * variance * attention.mean() / (variance.mean() + 1e-6)).mean())
    return np.array(scores)


def test_similarities_do_not_change_what_holov_gives_to_a_crop():
    rng = np.random.default_rng(3)
    for _ in range(200):
        a, p = rng.dirichlet(np.full(144, 0.3)), rng.normal(size=(144, 16)) + rng.normal(size=16)
        crops = crops_of(list(range(144)), 16)
        scores = published_scores_of_holov(a, p, crops)
        np.testing.assert_allclose(scores, [1090 * a[crop].mean() for crop in crops], rtol=1e-5)
        for k in (7, 14, 22, 36):
            share = scores / (scores.sum() + 1e-6) * k
            tokens = np.floor(share).astype(int)
            tokens[np.argsort(-share, kind="stable")[: k - tokens.sum()]] += 1
            kept = choose("holov", tile(a, crops=16), k).visual
            counts = [sum(j in crop for j in kept) for crop in crops]
            if (tokens <= 9).all():
                assert counts == tokens.tolist()


def test_oracle_hiprune_by_hand():
    middle, deep = np.arange(16.0), np.zeros(16)
    deep[[3, 9]] = 2, 1

    def kept(best, k, share=1.0, columns=4):
        scores = np.where(np.arange(16) == best, 99.0, -middle)
        options = {"received": np.stack([scores, deep]), "columns": columns, "anchor_share": share}
        return choose("hiprune", tile([1] * 16, **options), k).visual

    assert kept(5, 7) == [1, 4, 5, 6, 9, 3, 0]  # a cross, and 3 and 0 of the deep block
    assert kept(5, 7, share=0.1) == [3, 9, 0, 1, 2, 4, 5]  # no anchor
    assert kept(7, 5) == [3, 6, 7, 8, 11]  # 8 comes after 7, in the next row
    assert kept(2, 5) == [0, 1, 2, 3, 6]  # nothing is above the first row: the first patch
    assert kept(14, 5) == [10, 13, 14, 15, 3]  # below the last row the last patch, which is there already
    assert kept(5, 4) == [3, 9, 0, 1]  # a cross would exceed the budget
