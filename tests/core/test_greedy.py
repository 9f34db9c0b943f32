"""The greedy loops: both ways to take products, blocks of rows, and how little one step costs on an accelerator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import farthest_points as farthest_oracle
from oracle import herding
from oracle_methods import Tile, choose
from second_device import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from reccomp_hf import TokenRecoveryConfig, VisualFeatures
from reccomp_hf.core import greedy, tensors
from reccomp_hf.core.methods.cdpruner import largest_volume, scaled_relevance
from reccomp_hf.core.methods.registry import get_method

ROWS, PATCHES, WIDTH = 5, 24, 40  # wider than there are patches: cosines are float32
COUNTS = torch.tensor([0, 3, 9, 1, 7])

ways = pytest.mark.parametrize("at_once", [0, 10**9], ids=["product by product", "all products at once"])


@pytest.fixture
def drawn():
    """Features (B, N, C), similarities (B, N), and patches that may be chosen (B, N), at least twelve of each row."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, PATCHES, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)
    similarity = torch.rand(ROWS, PATCHES, generator=generator)
    candidates = torch.rand(ROWS, PATCHES, generator=generator) < 0.8
    assert (candidates.sum(-1) >= 12).all()
    return features, similarity, candidates


@pytest.mark.parametrize("count", [1, 127, 130, 144])
def test_products_of_all_are_those_of_one_product(count):
    """With 128 patches or more they are computed in blocks, here of unequal size."""
    vectors = torch.randn(2, count, 24, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    found = greedy.products_of_all(vectors)
    torch.testing.assert_close(found, vectors @ vectors.transpose(1, 2))
    torch.testing.assert_close(found, found.transpose(1, 2), rtol=0, atol=1e-12)


def chosen(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def herd(features, similarity, candidates, counts=COUNTS):
    units = torch.nn.functional.normalize(features, dim=-1)
    return greedy.herd_patches(units, torch.ones_like(candidates), candidates, counts, 9)


def widen(features, similarity, candidates, counts=COUNTS):
    return largest_volume(features, scaled_relevance(similarity, candidates), candidates, counts, 9)


def volume_oracle(features, similarity, candidates, count):
    """CDPruner's plain loop over the candidates of one row."""
    tile = Tile(
        h=features,
        keys=features,
        a=similarity,
        s=similarity,
        p=features,
        received=None,
        columns=1,
        patches=candidates,
        num_heads=1,
        options={},
    )
    found = choose("cdpruner", tile, count)
    assert min(tile.gaps, default=math.inf) > 1e-5
    return found.text


def herding_oracle(features, similarity, candidates, count):
    return herding(features, range(PATCHES), candidates, count)


LOOPS = {"herding": (herd, herding_oracle), "volume": (widen, volume_oracle)}
each_loop = pytest.mark.parametrize(("loop", "oracle"), LOOPS.values(), ids=LOOPS)


@ways
@each_loop
def test_both_ways_choose_as_the_plain_loop(loop, oracle, at_once, drawn, monkeypatch):
    monkeypatch.setattr(greedy, "_PRODUCTS_AT_ONCE", at_once)
    features, similarity, candidates = drawn
    for row, found in enumerate(chosen(loop(*drawn))):
        arrays = features[row].double().numpy(), similarity[row].double().numpy()
        wanted = oracle(*arrays, np.flatnonzero(candidates[row].numpy()).tolist(), int(COUNTS[row]))
        assert found == sorted(wanted)
        assert len(found) == COUNTS[row]


@each_loop
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_blocks_of_rows_choose_the_same(loop, oracle, rows, drawn, monkeypatch):
    wanted = loop(*drawn)
    calls = []
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda tensor, size: calls.append(size) or split(tensor, size))
    monkeypatch.setattr(greedy, "_BLOCK_BYTES", rows * PATCHES * WIDTH * 4)
    assert loop(*drawn).equal(wanted)
    assert set(calls) == {rows}


@each_loop
def test_no_rows_and_no_counts(loop, oracle, drawn):
    features, similarity, candidates = drawn
    assert not loop(*drawn, counts=torch.zeros_like(COUNTS)).any()
    assert loop(features[:0], similarity[:0], candidates[:0], counts=COUNTS[:0]).shape == (0, PATCHES)


def test_farthest_points_keep_off_what_is_not_a_candidate(drawn):
    _, _, candidates = drawn
    grid, kept = (4, 6), torch.zeros_like(candidates)
    kept[:3, 5] = True
    free = candidates & ~kept
    found = greedy.farthest_points(tensors.squared_distances(kept, grid), free, COUNTS, grid, 9)
    for row, picks in enumerate(chosen(found)):
        wanted = farthest_oracle(
            np.flatnonzero(kept[row]).tolist(), np.flatnonzero(free[row]).tolist(), int(COUNTS[row]), 6
        )
        assert picks == sorted(wanted)


class Kernels(TorchDispatchMode):
    """Counts operators that compute: on an accelerator views and new memory launch nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        return func(*args, **(kwargs or {}))


def operators(settings, patches=64, width=8):
    """Number of operators that a choice launches on features of a second device."""

    def made(*shape):
        return torch.zeros(*shape, device=DEVICE)

    arguments = made(3, patches, width), made(3, width), made(3, patches + 1, width), made(3, patches)
    features = VisualFeatures(*arguments, projected=made(3, patches, 12), word_similarity=made(3, 32, patches))
    with Kernels() as counted:
        get_method(settings.method).select(features, settings)
    return counted.count


STEPS = {
    "divprune": (3, {"method": "divprune"}),
    "cdpruner": (7, {"method": "cdpruner"}),
    "herding": (3, {"coverage_share": 1.0, "coverage_by": "content", "merged_tokens": 0}),
    "farthest points": (4, {"coverage_share": 1.0, "coverage_by": "place", "merged_tokens": 0}),
}


@pytest.mark.parametrize(("most", "fields"), STEPS.values(), ids=STEPS)
def test_a_step_launches_few_kernels(most, fields, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # autocast has no device `meta`
    few, many = (operators(TokenRecoveryConfig(budget=budget, **fields)) for budget in (10, 30))
    assert many - few == 20 * most
    assert operators(TokenRecoveryConfig(budget=30, **fields), patches=100) == many


def test_kernels_are_counted_without_views():
    with Kernels() as counted:
        torch.zeros(2, 3).t().unsqueeze(0).add(1).sum()
    assert counted.count == 3
