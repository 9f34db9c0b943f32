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
from reccomp_hf.core.methods import cdpruner
from reccomp_hf.core.methods.cdpruner import largest_volume, scaled_relevance
from reccomp_hf.core.methods.registry import get_method

ROWS, PATCHES, WIDTH = 5, 24, 40  # wider than there are patches: cosines are float32
COUNTS = torch.tensor([0, 3, 9, 1, 7])

WAYS = {
    "product by product": {"_PRODUCTS_AT_ONCE": 0, "_ALONE_BYTES": 10**9},
    "all products at once": {"_PRODUCTS_AT_ONCE": 10**9, "_ALONE_BYTES": 10**9},
    "by numpy": {"_PRODUCTS_ALONE": 1, "_ALONE_BYTES": 1},
}
"""Name of a way to take products -> values of the constants that choose it for images of a batch."""
ways = pytest.mark.parametrize("constants", WAYS.values(), ids=WAYS)


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
def test_every_way_chooses_as_the_plain_loop(loop, oracle, constants, drawn, monkeypatch):
    for name, value in constants.items():
        monkeypatch.setattr(greedy, name, value)
    features, similarity, candidates = drawn
    for row, found in enumerate(chosen(loop(*drawn))):
        arrays = features[row].double().numpy(), similarity[row].double().numpy()
        wanted = oracle(*arrays, np.flatnonzero(candidates[row].numpy()).tolist(), int(COUNTS[row]))
        assert found == sorted(wanted)
        assert len(found) == COUNTS[row]


@pytest.fixture
def by_numpy(monkeypatch):
    """The largest numbers of steps that were made in numpy, one for each image."""
    steps, in_blocks = [], greedy.in_blocks

    def watched(choose, arguments, most, row_bytes=None, alone=None):
        def noted(*block):
            steps.append(block[-1])
            return alone(*block)

        return in_blocks(choose, arguments, most, row_bytes, alone and noted)

    for module in (greedy, cdpruner):
        monkeypatch.setattr(module, "in_blocks", watched)
    return steps


@each_loop
def test_numpy_takes_the_steps_of_single_and_of_large_images_that_choose_few(
    loop, oracle, drawn, by_numpy, monkeypatch
):
    loop(*drawn)
    assert by_numpy == []  # small images are taken together
    few, many = torch.tensor([PATCHES // 3]), torch.tensor([PATCHES // 3 + 1])
    one = [value[1:2] for value in drawn]
    loop(*one, counts=few)
    loop(*one, counts=many)
    assert by_numpy == [8]
    monkeypatch.setattr(greedy, "_ALONE_BYTES", PATCHES * WIDTH * 4 + 1)
    loop(*drawn, counts=COUNTS.clamp(max=8))
    assert by_numpy == [8]
    monkeypatch.setattr(greedy, "_ALONE_BYTES", PATCHES * WIDTH * 4)
    monkeypatch.setattr(greedy, "_PRODUCTS_ALONE", 2)  # for the 9 steps that `loop` asks for at most
    wanted = loop(*drawn)
    assert by_numpy == [8, 3, 9, 1, 7]  # an image that chooses nothing takes no steps
    monkeypatch.setattr(greedy, "_ALONE_BYTES", 10**9)
    assert loop(*drawn).equal(wanted)
    monkeypatch.setattr(greedy, "_BLOCK_BYTES", PATCHES * WIDTH * 4 - 1)  # larger than the cache
    by_numpy.clear()
    loop(*one, counts=torch.tensor([4]))
    loop(*one, counts=torch.tensor([5]))
    assert by_numpy == [4]


@each_loop
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_numpy_reads_features_of_any_dtype(loop, oracle, dtype, drawn, by_numpy, monkeypatch):
    features, similarity, candidates = drawn
    features = features.to(dtype)
    single = [
        loop(features[row : row + 1], similarity[row : row + 1], candidates[row : row + 1], COUNTS[row : row + 1])
        for row in range(ROWS)
    ]
    assert by_numpy == [3, 1, 7]
    assert torch.cat(single).equal(loop(features, similarity, candidates))


@each_loop
@pytest.mark.parametrize("odd", [0.0, math.inf, math.nan], ids=["zero", "inf", "nan"])
@pytest.mark.filterwarnings("error")
def test_numpy_takes_odd_features_as_torch_does(loop, oracle, odd, drawn, monkeypatch):
    """Patches of length 0, or of infinite length, or without one, which leave herding no mean: without a warning."""
    features, similarity, candidates = (value[1:3].clone() for value in drawn)
    features[:, 4] = odd
    candidates[:, 4] = True
    counts = torch.tensor([6, 7])
    wanted = loop(features, similarity, candidates, counts)
    monkeypatch.setattr(greedy, "_ALONE_BYTES", 1)
    monkeypatch.setattr(greedy, "_PRODUCTS_ALONE", 2)
    found = loop(features, similarity, candidates, counts)
    if odd == 0 or loop is widen:
        assert found.equal(wanted)
    assert not (found & ~candidates).any()


@each_loop
def test_the_first_of_equal_patches_is_taken_by_numpy_too(loop, oracle, drawn, by_numpy):
    features, similarity, candidates = (value[1:2].clone() for value in drawn)
    candidates[:] = True
    first = chosen(loop(features, similarity, candidates, torch.tensor([1])))[0][0]
    for value in (features, similarity):
        value[:, -1] = value[:, first]
    assert chosen(loop(features, similarity, candidates, torch.tensor([1]))) == [[first]]
    assert by_numpy == [1, 1]


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
