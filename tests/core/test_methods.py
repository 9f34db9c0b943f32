"""The methods to compare with against the plain loops of oracle_methods.py, and what each of them promises."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import MASKS, TOLERANCE, Case, check_form, make_case, mask_of_counts
from oracle import saliency_oracle
from oracle_methods import METHODS, OPTIONS, Tile, choose, method_oracles, tile_budgets

from reccomp_hf import TokenRecoveryConfig, recover_tokens

DYNAMIC = ("prumerge", "prumerge_plus", "trim")
MERGING = (*DYNAMIC, "visionzip")
HEADS, WIDTH, PROJECTED = 4, 64, 24  # no head is as wide as there are heads
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_method = pytest.mark.parametrize("method", METHODS)


def draw(n, batch=3, seed=0, dtype=torch.float32):
    """Random images, and what the projector might make of their patches."""
    projected = np.stack([np.random.default_rng([9, seed, b, n]).normal(size=(n, PROJECTED)) for b in range(batch)])
    return make_case(batch, n, WIDTH, seed, dtype), torch.from_numpy(projected).to(dtype)


def check(method, drawn, own_saliency=False, valid=None, tiles=None, **fields):
    """Compare every field of every row with the oracle's, which starts from the package's saliency or its own."""
    (case, projected), config = drawn, TokenRecoveryConfig(method=method, **fields)
    output = case.recover(config, num_heads=HEADS, projected=projected, valid=valid, tiles=tiles)
    check_form(case, output, tight=(valid is None and tiles is None) or config.budget is None)
    h, q, keys, p = (x.double().numpy() for x in (case.hidden_states, case.class_query, case.keys, projected))
    exists = np.ones(h.shape[:2], dtype=bool) if valid is None else valid.numpy()
    heads = HEADS if config.visual_heads == "mean" else 1
    saliency = np.stack([saliency_oracle(q[b], keys[b], exists[b], heads) for b in range(len(h))])
    np.testing.assert_allclose(output.saliency.numpy(), saliency, rtol=2e-5, atol=1e-7)
    saliency = saliency if own_saliency else output.saliency.numpy()
    s = case.text_similarity.float().numpy()
    named = {"num_heads": HEADS, "valid": exists, "tiles": tiles, "projected": p}
    for b, row in enumerate(method_oracles(h, keys, saliency, s, config, **named)):
        assert row["gap"] > 1e-6, "these numbers are too near to each other to compare: draw others"
        count = row["counts"]
        assert int(output.counts[b]) == count
        for name in MASKS:
            assert getattr(output, name)[b].tolist() == row[name], (name, b)
        assert output.cluster[b].tolist() == row["cluster"]
        assert output.places[b].tolist() == row["places"] + [-1] * (output.places.shape[1] - count)
        assert not output.tokens[b, count:].any()
        kept = int(output.kept_mask[b].sum())
        assert torch.equal(output.tokens[b, :kept], case.hidden_states[b, row["places"][:kept]])
        tokens = torch.from_numpy(row["tokens"])
        torch.testing.assert_close(output.tokens[b, :count].double(), tokens, **TOLERANCE[output.tokens.dtype])
    return output


# ---- the oracle itself, by hand ------------------------------------------------------------------------------------


def tile(a, keys=None, h=None, p=None, s=None, heads=1, **options):
    """One tile for the oracle, its features one-hot if they are not given."""
    n = len(a)
    h = np.eye(n) if h is None else h
    return Tile(h, np.array(keys or np.eye(n)), np.array(a), s, p, list(range(n)), heads, options)


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
    choice = choose("prumerge_plus", tile([1, 1, 1, 1, 9, 1, 1, 9], neighbors=1), None)
    assert [place for place, _, _ in choice.merged] == [0, 4, 7, 1]  # every fourth: two of eight are outliers


def test_oracle_visionzip_by_hand():
    keys = [[9, 9], [9, 9], [1, 0], [0, 2], [0, 1], [1, 3]]
    choice = choose("visionzip", tile([6, 5, 4, 3, 2, 1], keys, contextual_share=0.5), 4)
    assert choice.visual == [0, 1]
    assert [members for _, _, members in choice.merged] == [[2], [4, 3, 5]]
    np.testing.assert_allclose([token for _, token, _ in choice.merged], [np.eye(6)[2], [0, 0, 0, 0.5, 1, 0.5]])
    # With two heads, keys are compared by their mean: all the same here, so the first target takes everything.
    choice = choose("visionzip", tile([6, 5, 4, 3, 2, 1], keys, contextual_share=0.5, heads=2), 4)
    assert [members for _, _, members in choice.merged] == [[2, 3, 5], [4]]


def test_oracle_vispruner_by_hand():
    h = on_circle(0, 10, 90, 200, 205)
    assert choose("vispruner", tile([1] * 5, h=h, important_share=0.0, step=1), 2).coverage == [2, 3]
    assert choose("vispruner", tile([1] * 5, h=h, important_share=0.0, step=2), 3).coverage == [1, 2, 3]
    choice = choose("vispruner", tile([1, 1, 1, 1, 2], h=h, important_share=1.0, step=1), 2)
    assert (choice.visual, choice.coverage) == ([4], [3])


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


# ---- equal to the oracle -------------------------------------------------------------------------------------------


@DTYPES
@every_method
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_every_budget(method, n, dtype):
    drawn = draw(n, seed=1, dtype=dtype)
    for budget in range(1, n + 1):
        output = check(method, drawn, budget=budget)
        assert output.counts.tolist() == [budget] * 3
        assert output.tokens.shape[1] == budget
        assert (output.places >= 0).all()
        assert all(len(set(row)) == budget for row in output.places.tolist())


@DTYPES
@every_method
@pytest.mark.parametrize("n", [36, 64])
def test_larger_images(method, n, dtype):
    for seed, budget in ((60, 9), (61, 0.5), (62, n - 1), (63, n), (64, 0.07), (65, 0.9)):
        output = check(method, draw(n, 2, seed, dtype), budget=budget)
        count = budget if isinstance(budget, int) else math.floor(budget * n + 0.5)
        assert output.counts.tolist() == [count] * 2
        assert bool(output.centre_mask.any()) == (
            method in MERGING and count < n and (method != "visionzip" or count >= 7)
        )


@pytest.mark.parametrize("batch", [1, 2, 5])
@every_method
def test_with_a_saliency_of_the_oracles_own(method, batch):
    for seed in range(4):
        check(method, draw(49, batch, 20 + seed), own_saliency=True, budget=12)
        check(method, draw(49, batch, 20 + seed), own_saliency=True, budget=12, visual_heads="joint")


@DTYPES
@pytest.mark.parametrize("method", DYNAMIC)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 36, 64, 144])
def test_dynamic_counts(method, n, dtype):
    counts = []
    for seed in range(3):
        counts += check(method, draw(n, 2, 130 + seed, dtype)).counts.tolist()
    if n >= 36:
        assert len(set(counts)) > 1
        assert max(counts) > 2


def test_where_nothing_stands_out_one_patch_is_taken():
    case, projected = draw(30)
    case.class_query[:], case.text_similarity[:] = 0, 0.3
    for method, count in (("prumerge", 2), ("trim", 2), ("prumerge_plus", 2)):
        output = check(method, (case, projected))
        assert output.counts.tolist() == [count] * 3
        assert output.places.tolist() == [[0, 1]] * 3


def test_trim_looks_for_outliers_after_the_softmax():
    """Which stretches large differences: what is no outlier of the scores is one of their softmax."""
    for seed in range(3):
        case, projected = draw(36, 4, 90 + seed)
        case.text_similarity = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 36))).float() * 2
        output = check("trim", (case, projected))
        first, third = torch.quantile(case.text_similarity, torch.tensor([0.25, 0.75]), dim=-1, keepdim=True)
        assert (case.text_similarity > third + 1.5 * (third - first)).sum() < output.text_mask.sum() / 3


@pytest.mark.parametrize("heads", ["joint", "mean"])
@pytest.mark.parametrize("budget", [None, 1, 7, 20, 48, 0.3])
@every_method
def test_missing_patches(method, budget, heads):
    if budget is None and method not in DYNAMIC:
        return
    case, projected = draw(48, batch=6, seed=8)
    valid = mask_of_counts([48, 40, 21, 7, 2, 1], 48)
    case.hidden_states[~valid], case.keys[:, 1:][~valid], projected[~valid] = 50.0, 3.0, 50.0
    case.text_similarity[~valid] = 9.0
    output = check(method, (case, projected), valid=valid, budget=budget, visual_heads=heads)
    assert not (output.kept_mask & ~valid).any()
    assert (output.cluster[~valid] == -1).all()
    if isinstance(budget, int):
        assert output.counts.tolist() == [min(budget, count) for count in (48, 40, 21, 7, 2, 1)]


@DTYPES
@pytest.mark.parametrize("budget", [None, 1, 2, 5, 31, 60, 0.02, 0.2, 0.77])
@every_method
def test_tiles_share_a_budget(method, budget, dtype):
    if budget is None and method not in DYNAMIC:
        return
    sizes, counts = [3, 1, 2, 4], [25, 25, 10, 25, 7, 21, 25, 1, 2, 13]
    valid, drawn = mask_of_counts(counts, 25, seed=1), draw(25, 10, seed=9, dtype=dtype)
    output = check(method, drawn, valid=valid, tiles=sizes, budget=budget)
    if budget is None:
        return
    given, start = [], 0
    for size in sizes:
        share = counts[start : start + size]
        total = min(budget, sum(share)) if isinstance(budget, int) else max(1, math.floor(budget * sum(share) + 0.5))
        assert int(output.counts[start : start + size].sum()) == total
        given += tile_budgets(budget, share)
        start += size
    assert output.counts.tolist() == given
    whole = check(method, drawn, tiles=sizes, budget=budget)  # no patch is missing
    assert whole.counts.sum() >= output.counts.sum()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prumerge", {"neighbors": 1}),
        ("prumerge", {"neighbors": 7}),
        ("prumerge", {"neighbors": 1000}),
        ("prumerge_plus", {"neighbors": 3}),
        ("prumerge_plus", {"uniform_share": 0.0}),
        ("prumerge_plus", {"uniform_share": 1.0}),
        ("prumerge_plus", {"uniform_share": 0.29, "neighbors": 5}),
        ("visionzip", {"contextual_share": 0.0}),
        ("visionzip", {"contextual_share": 0.57}),
        ("visionzip", {"contextual_share": 1}),
        ("vispruner", {"important_share": 0.0}),
        ("vispruner", {"important_share": 1.0}),
        ("vispruner", {"important_share": 0.29, "step": 1}),
        ("vispruner", {"step": 3}),
        ("vispruner", {"step": 1000}),
    ],
    ids=str,
)
def test_options(method, options):
    drawn, differs = draw(49, 2, seed=10), []
    standard = {**OPTIONS[method], **options} == OPTIONS[method]
    for budget in (1, 2, 3, 11, 30, 48, 0.4):
        output = check(method, drawn, budget=budget, method_options=options)
        usual = check(method, drawn, budget=budget)
        differs.append(not torch.equal(output.tokens, usual.tokens))
    if method in DYNAMIC:
        check(method, drawn, method_options=options)
    assert any(differs) != standard


@pytest.mark.parametrize(
    ("method", "option", "n"), [("vispruner", "important_share", 101), ("prumerge_plus", "uniform_share", 102)]
)
def test_a_share_is_rounded_down_as_python_does(method, option, n):
    """0.29 of 100 is 28.999999999999996 in float64, and 29 in float32."""
    drawn, budget = draw(n, 1, seed=11), n - 1
    check(method, drawn, budget=budget, method_options={option: 0.29})
    check(method, drawn, budget=budget, tiles=[1], valid=torch.ones(1, n, dtype=torch.bool))
    two = draw(n, 2, seed=11)
    check(method, two, budget=2 * budget, tiles=[2], method_options={option: 0.29})


# ---- ties ----------------------------------------------------------------------------------------------------------


def signs(rng, rows, width, kinds):
    """Rows of 1 and -1, of so many kinds: lengths and cosines are exact, and most are equal."""
    patterns = rng.choice([-1.0, 1.0], size=(kinds, width))
    return torch.from_numpy(patterns[rng.integers(kinds, size=rows)]).float()


def tied(n, seed, kinds=5):
    """Images full of equal scores and equal features; head-mean keys are exact too."""
    rng = np.random.default_rng([3, seed, n])
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 16:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    keys = torch.stack([signs(rng, n + 1, WIDTH // HEADS, kinds).repeat(1, HEADS) for _ in range(2)])
    h = torch.stack([signs(rng, n, WIDTH, kinds) for _ in range(2)])
    query = torch.zeros(2, WIDTH)
    query[1, :5] = 2.0
    s = torch.from_numpy(rng.integers(3, size=(2, n)) / 4).float()
    projected = hadamard[torch.from_numpy(rng.integers(kinds, size=(2, n)))]
    return Case(h, query, keys, s), projected


@DTYPES
@pytest.mark.parametrize("n", [5, 16, 36])
@every_method
def test_ties_go_to_the_lower_raster_index(method, n, dtype):
    for seed in range(2):
        case, projected = tied(n, seed)
        drawn = case.to(dtype), projected.to(dtype)
        for budget in (*range(1, min(n, 8) + 1), n // 2, n - 2, *([None] if method in DYNAMIC else [])):
            output = check(method, drawn, budget=budget)
            assert len(output.saliency[0].unique()) == 1
            assert len(output.saliency[1].unique()) <= 5
    valid = mask_of_counts([n - 1, n - 2], n)
    check(method, drawn, budget=n // 2, valid=valid)


@pytest.mark.parametrize("n", [5, 7, 20])
def test_divprune_begins_with_the_first_of_two_patches_that_are_nearest_to_each_other(n):
    """Their distance is one number, whichever of them it is taken from."""
    for seed in range(12):
        case, projected = draw(n, 3, 40 + seed)
        projected[..., 0] = 20.0  # a crowd, and two patches far from it and from each other
        lonely = sorted(np.random.default_rng(seed).permutation(n)[:2].tolist())
        projected[:, lonely, 0] = -3.0
        for budget in (1, 2, 3):
            output = check("divprune", (case, projected), budget=budget)
            assert output.coverage_mask[:, lonely[0]].all()


def test_cdpruner_begins_with_the_first_of_the_most_relevant_patches():
    """A patch's cosine with itself is 1, whatever rounding makes of it."""
    for seed in range(5):
        case, projected = draw(20, 3, 50 + seed)
        case.text_similarity = (case.text_similarity * 8).round() / 8
        case.text_similarity[0] = 0.25
        for budget in (1, 2, 3, 19):
            output = check("cdpruner", (case, projected), budget=budget)
            assert output.text_mask.gather(1, case.text_similarity.argmax(-1, keepdim=True)).all()


def test_more_tokens_than_the_features_have_directions():
    """Beyond the rank of the projected features no patch adds volume: what is left goes by relevance."""
    case, projected = draw(30, 3, seed=12)
    projected[..., 4:] *= 2e-4
    by_volume = check("cdpruner", (case, projected), budget=20)  # of volumes below 1e-6, but not yet nothing
    projected[..., 4:] = 0
    by_relevance = check("cdpruner", (case, projected), budget=20)
    for b in range(3):
        most_relevant = set(case.text_similarity[b].argsort(descending=True, stable=True)[:20].tolist())
        assert len(most_relevant - set(by_relevance.places[b].tolist())) <= 4
        assert by_volume.places[b].tolist() != by_relevance.places[b].tolist()


# ---- promises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [11, 36, None])
@every_method
def test_a_row_does_not_depend_on_its_neighbours(method, budget):
    if budget is None and method not in DYNAMIC:
        return
    (case, projected), config = draw(36, 5, seed=13), TokenRecoveryConfig(method=method, budget=budget)
    together = case.recover(config, num_heads=HEADS, projected=projected)
    for b in range(5):
        alone = case.row(b).recover(config, num_heads=HEADS, projected=projected[b : b + 1])
        count = int(alone.counts)
        assert count == int(together.counts[b])
        for name in (*MASKS, "cluster"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[b])
        torch.testing.assert_close(alone.tokens[0], together.tokens[b, :count], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 4, 9, None])
@every_method
def test_the_gradient_reaches_the_features_and_nothing_else(method, budget):
    if budget is None and method not in DYNAMIC:
        return
    case, projected = draw(9, 2, seed=14, dtype=torch.float64)
    config = TokenRecoveryConfig(method=method, budget=budget, method_options=OPTIONS.get(method, {}))
    for x in (case.class_query, case.keys, case.text_similarity, projected):
        x.requires_grad_()
    features = case.hidden_states.requires_grad_()

    def tokens(h):
        return dataclasses.replace(case, hidden_states=h).recover(config, num_heads=HEADS, projected=projected).tokens

    assert tokens(features).dtype == torch.float64
    assert torch.autograd.gradcheck(tokens, (features,), fast_mode=True)
    tokens(features).sum().backward()
    assert features.grad.any()
    for x in (case.class_query, case.keys, case.text_similarity, projected):
        assert x.grad is None or not x.grad.any()


@every_method
def test_the_inputs_are_left_as_they_were(method):
    case, projected = draw(25, seed=15)
    before = [x.clone() for x in (*vars(case).values(), projected)]
    case.recover(TokenRecoveryConfig(method=method, budget=8), num_heads=HEADS, projected=projected)
    assert all(torch.equal(x, old) for x, old in zip((*vars(case).values(), projected), before, strict=True))


@pytest.mark.parametrize(
    ("method", "published"),
    [
        ("visual", ("last", 1, -2, "mean")),
        ("prumerge", ("last", 1, -1, "mean")),
        ("prumerge_plus", ("last", 1, -1, "mean")),
        ("visionzip", ("last", 1, -2, "mean")),
        ("trim", ("penultimate", -1, -1, "joint")),
        ("vispruner", ("last", 1, -2, "mean")),
        ("divprune", ("last", 1, -1, "joint")),
        ("cdpruner", ("penultimate", -1, -1, "joint")),
    ],
)
def test_a_method_brings_its_published_settings(method, published):
    names = ("text_relevance", "text_relevance_sign", "visual_layer", "visual_heads")
    config = TokenRecoveryConfig(method=method, budget=8)
    assert tuple(getattr(config, name) for name in names) == published
    assert TokenRecoveryConfig(method=method, budget=8, visual_layer=-3, visual_heads="mean").visual_layer == -3


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["visual", "visionzip", "vispruner", "divprune", "cdpruner", "random"])
def test_a_budget_is_needed(method):
    with pytest.raises(ValueError, match=f"{method}.* needs a budget"):
        TokenRecoveryConfig(method=method)


@every_method
def test_what_a_method_reads_is_needed(method):
    (case, projected), config = draw(9), TokenRecoveryConfig(method=method, budget=4)
    if method in ("trim", "cdpruner"):
        with pytest.raises(ValueError, match="needs a question"):
            case.without_text().recover(config, projected=projected)
    else:
        case.without_text().recover(config, projected=projected)
    if method in ("divprune", "cdpruner"):
        with pytest.raises(ValueError, match="projected"):
            case.recover(config)
        with pytest.raises(ValueError, match="projected"):
            case.recover(config, projected=projected[:, :8])
    else:
        plain = case.recover(config, num_heads=HEADS)
        assert torch.equal(plain.tokens, case.recover(config, num_heads=HEADS, projected=projected).tokens)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("prumerge", {"neighbors": 0}, "neighbors"),
        ("prumerge", {"neighbors": 2.5}, "neighbors"),
        ("prumerge", {"neighbours": 3}, "neighbors"),  # what was meant
        ("prumerge_plus", {"uniform_share": 1.1}, "uniform_share"),
        ("visionzip", {"contextual_share": -0.1}, "contextual_share"),
        ("vispruner", {"important_share": True}, "important_share"),
        ("vispruner", {"step": 0}, "step"),
        ("random", {"seed": -1}, "seed"),
        ("random", {"seed": 1.0}, "seed"),
        ("visual", {"step": 8}, "step"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(method, options, match):
    with pytest.raises(ValueError, match=match):
        TokenRecoveryConfig(method=method, budget=8, method_options=options)


# ---- the seed of chance --------------------------------------------------------------------------------------------


def kept_at_random(states, seed, budget=36, **named):
    config = TokenRecoveryConfig(method="random", budget=budget, method_options={} if seed is None else {"seed": seed})
    keys = torch.cat([states[:, :1], states], 1)
    return recover_tokens(states, states[:, 0], keys, None, config, **named)


def test_seed_0_is_the_choice_there_was_before_there_were_seeds():
    # Whole numbers, so that every machine compares them alike; the places were written down before seeds came.
    states = (torch.arange(2 * 64 * 8) * 7919 % 1009).float().view(2, 64, 8)
    for seed in (None, 0):
        places = kept_at_random(states, seed, 10).places.tolist()
        assert places == [[3, 4, 21, 25, 32, 36, 41, 42, 43, 56], [1, 9, 14, 20, 23, 36, 41, 51, 59, 60]]
        tiles = kept_at_random(states, seed, 10, tiles=[2]).places.tolist()
        assert tiles == [[4, 25, 41, 56, -1, -1], [10, 13, 16, 21, 27, 48]]


def test_other_seeds_choose_otherwise_and_as_if_independently():
    states = torch.randn(400, 144, 4, generator=torch.Generator().manual_seed(0))
    masks = []
    for seed in (0, 1, 2, 2**70):
        output = kept_at_random(states, seed)
        assert output.counts.tolist() == [36] * 400
        assert torch.equal(output.visual_mask, kept_at_random(states, seed).visual_mask)
        assert torch.equal(output.visual_mask[7], kept_at_random(states[7:8], seed).visual_mask[0])
        masks.append(output.visual_mask)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            both = (one & other).sum(-1).double()  # hypergeometric: 9 of 36, variance 36 * 1/4 * 3/4 * 108/143
            assert abs(float(both.mean()) - 9) < 5 * math.sqrt(5.098 / 400)
            assert 0.7 < float(both.var()) / 5.098 < 1.3


def test_every_seed_is_uniform():
    rows, share = 4000, 0.25
    states = torch.randn(rows, 144, 4, generator=torch.Generator().manual_seed(1))
    for seed in (1, 12345):
        often = kept_at_random(states, seed).visual_mask.double().mean(0)
        spread = math.sqrt(share * (1 - share) / rows)
        assert (often - share).abs().max() < 4.5 * spread
        assert abs(float((often - share).pow(2).mean()) / spread**2 - 1) < 0.5  # nor more even than chance
    one = states[:1].expand(600, -1, -1)[:1]  # a picture, over many seeds
    often = torch.cat([kept_at_random(one, seed).visual_mask for seed in range(600)]).double().mean(0)
    assert (often - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 600)
