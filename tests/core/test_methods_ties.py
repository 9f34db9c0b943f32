"""Comparison methods where scores or features are equal: the lower raster index wins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Case, mask_of_counts
from method_cases import DTYPES, DYNAMIC, HEADS, WIDTH, check, draw, every_method


def signs(rng, rows, width, kinds):
    """Rows of 1 and -1, of `kinds` kinds: lengths and cosines are exact, and most are equal."""
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


@pytest.mark.parametrize("method", ["visual", "scope", "holov"])
def test_a_class_token_that_attends_to_itself_alone(method):
    """Saliency is 0 everywhere: nothing is divided by its sum, and the first patches are taken."""
    case, projected = draw(20, 2, seed=55)
    case.keys[:, 0] = 1000 * case.class_query
    for budget in (1, 3, 17, 19):
        output = check(method, (case, projected), budget=budget)
        assert not output.saliency.any()
        assert output.counts.tolist() == [budget] * 2
