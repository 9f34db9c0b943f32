"""The comparison methods equal the plain loops of oracle_methods.py; their promises and errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import MASKS, mask_of_counts
from method_cases import DTYPES, DYNAMIC, HEADS, MERGING, check, draw, each_budget, every_method
from oracle_budgets import tile_budgets
from oracle_methods import OPTIONS

from reccomp_hf import TokenRecoveryConfig

# --- equal to the oracle ---------------------------------------------------------------------------------------------


@DTYPES
@every_method
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_every_budget(method, n, dtype):
    drawn = draw(n, seed=1, dtype=dtype)
    for budget in range(1, n + 1):
        output = check(method, drawn, budget=budget)
        assert output.counts.tolist() == [budget] * 3
        assert output.tokens.shape[1] == budget
        class_tokens = int(method == "visionzip" and budget < n)  # has no place
        assert (output.places < 0).sum(-1).tolist() == [class_tokens] * 3
        assert all(len(set(row)) == budget for row in output.places.tolist())


@DTYPES
@every_method
@pytest.mark.parametrize("n", [36, 64])
def test_larger_images(method, n, dtype):
    for seed, budget in ((60, 9), (66, 0.5), (62, n - 1), (63, n), (64, 0.07), (65, 0.9)):
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


def test_without_outliers_one_patch_is_taken():
    case, projected = draw(30)
    case.class_query[:], case.text_similarity[:] = 0, 0.3
    for method in DYNAMIC:
        output = check(method, (case, projected))
        places = [0, 10, 20, 1] if method == "prumerge_plus" else [0, 1]  # a third of the step of 30 patches
        assert output.counts.tolist() == [len(places)] * 3
        assert output.places.tolist() == [places] * 3


def test_trim_looks_for_outliers_after_the_softmax():
    """The softmax stretches large differences: a score that is not an outlier may be one after it."""
    for seed in range(3):
        case, projected = draw(36, 4, 90 + seed)
        case.text_similarity = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 36))).float() * 2
        output = check("trim", (case, projected))
        first, third = torch.quantile(case.text_similarity, torch.tensor([0.25, 0.75]), dim=-1, keepdim=True)
        assert (case.text_similarity > third + 1.5 * (third - first)).sum() < output.text_mask.sum() / 3


@pytest.mark.parametrize("heads", ["joint", "mean"])
@each_budget(None, 1, 7, 20, 48, 0.3)
def test_missing_patches(method, budget, heads):
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
@each_budget(None, 1, 2, 5, 31, 60, 0.02, 0.2, 0.77)
def test_tiles_share_a_budget(method, budget, dtype):
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
        ("visionzip", {"class_token": False}),
        ("visionzip", {"class_token": False, "contextual_share": 0.57}),
        ("vispruner", {"important_share": 0.0}),
        ("vispruner", {"important_share": 1.0}),
        ("vispruner", {"important_share": 0.29, "step": 1}),
        ("vispruner", {"step": 3}),
        ("vispruner", {"step": 1000}),
        ("holov", {"crops": 1}),
        ("holov", {"crops": 5}),
        ("holov", {"crops": 16}),
        ("holov", {"crops": 1000}),
        ("hiprune", {"anchor_share": 0}),
        ("hiprune", {"anchor_share": 0.5}),
        ("hiprune", {"anchor_share": 1.0}),
        ("hiprune", {"anchor_share": 0.1}),
        ("mmtok", {"alpha": 0}),
        ("mmtok", {"alpha": 1000}),
        ("mmtok", {"text_temperature": 0.3}),
        ("mmtok", {"visual_temperature": 2}),
        ("mmtok", {"alpha": 0.5}),
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


# --- promises --------------------------------------------------------------------------------------------------------


@each_budget(11, 36, None)
def test_a_row_does_not_depend_on_its_neighbours(method, budget):
    (case, projected), config = draw(36, 5, seed=13), TokenRecoveryConfig(method=method, budget=budget)
    output = case.recover(config, num_heads=HEADS, projected=projected)
    for b in range(5):
        alone = case.row(b).recover(config, num_heads=HEADS, projected=projected[b : b + 1])
        count = int(alone.counts)
        assert count == int(output.counts[b])
        for name in (*MASKS, "cluster"):
            assert torch.equal(getattr(alone, name)[0], getattr(output, name)[b])
        torch.testing.assert_close(alone.tokens[0], output.tokens[b, :count], rtol=1e-5, atol=1e-6)


@each_budget(1, 4, 9, None)
def test_the_gradient_reaches_the_features_and_nothing_else(method, budget):
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
        ("prumerge", ("last", 1, -1, "joint")),
        ("prumerge_plus", ("last", 1, -1, "joint")),
        ("visionzip", ("last", 1, -2, "mean")),
        ("trim", ("penultimate", -1, -1, "joint")),
        ("vispruner", ("last", 1, -2, "mean")),
        ("divprune", ("last", 1, -1, "joint")),
        ("cdpruner", ("penultimate", -1, -1, "joint")),
        ("scope", ("last", 1, -2, "mean")),
        ("holov", ("last", 1, -2, "mean")),
        ("hiprune", ("last", 1, -2, "joint")),
        ("mmtok", ("last", 1, -1, "joint")),
    ],
)
def test_a_method_brings_its_published_settings(method, published):
    names = ("text_relevance", "text_relevance_sign", "visual_layer", "visual_heads")
    config = TokenRecoveryConfig(method=method, budget=8)
    assert tuple(getattr(config, name) for name in names) == published
    assert TokenRecoveryConfig(method=method, budget=8, visual_layer=-3, visual_heads="mean").visual_layer == -3


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["visual", "visionzip", "vispruner", "divprune", "cdpruner", "scope", "holov", "hiprune", "mmtok", "random"],
)
def test_a_budget_is_needed(method):
    with pytest.raises(ValueError, match=f"{method}.* needs a budget"):
        TokenRecoveryConfig(method=method)


@every_method
def test_inputs_that_a_method_reads_are_required(method):
    (case, projected), config = draw(9), TokenRecoveryConfig(method=method, budget=4)
    if method in ("trim", "cdpruner"):
        with pytest.raises(ValueError, match="needs a question"):
            case.without_text().recover(config, projected=projected)
    else:
        case.without_text().recover(config, projected=projected)
    if method in ("divprune", "cdpruner", "mmtok"):
        with pytest.raises(ValueError, match="projected"):
            case.recover(config)
        with pytest.raises(ValueError, match="projected"):
            case.recover(config, projected=projected[:, :8])
        if method == "mmtok":
            with pytest.raises(ValueError, match="word_similarity is None"):
                case.recover(config, projected=projected, word_similarity=None)
            with pytest.raises(ValueError, match=r"word_similarity must have shape \(3, M, 9\), got \(3, 5, 8\)"):
                case.recover(config, projected=projected, word_similarity=case.word_similarity[..., :8])
    elif method == "visionzip":
        with pytest.raises(ValueError, match="class_state is None"):
            case.recover(config, class_state=None)
        with pytest.raises(ValueError, match="class_state must have shape"):
            case.recover(config, class_state=case.class_state[:, :8])
    elif method == "hiprune":
        with pytest.raises(ValueError, match="received"):
            case.recover(config, received=None)
        with pytest.raises(ValueError, match="received"):
            case.recover(config, received=case.received[:, :1])
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
        ("visionzip", {"class_token": 1}, "class_token must be true or false, got 1"),
        ("vispruner", {"important_share": True}, "important_share"),
        ("vispruner", {"step": 0}, "step"),
        ("holov", {"crops": 0}, "crops"),
        ("hiprune", {"anchor_share": 2}, "anchor_share"),
        ("hiprune", {"object_layer": 0}, "object_layer"),
        ("mmtok", {"alpha": -0.1}, "alpha"),
        ("mmtok", {"text_temperature": 0}, "text_temperature"),
        ("mmtok", {"visual_temperature": "0.2"}, "visual_temperature"),
        ("trim", {"similarity": "euclidean"}, "similarity"),
        ("random", {"seed": -1}, "seed"),
        ("random", {"seed": 1.0}, "seed"),
        ("visual", {"step": 8}, "step"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(method, options, match):
    with pytest.raises(ValueError, match=match):
        TokenRecoveryConfig(method=method, budget=8, method_options=options)
