"""The one-dimensional local outlier factor against scikit-learn and against the plain loop in oracle.py."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from oracle import lof_oracle
from sklearn.neighbors import LocalOutlierFactor

from reccomp_hf.core.outliers import local_outlier_factor

THRESHOLD = 1.5
EXACT_MARGIN = 1e-6  # relative distance of a factor to the threshold below which its label is not compared
# scikit-learn rounds float32 distances to float32 (6e-8 each) and takes two means over at most 40 neighbours and two
# quotients in float32: less than 40 roundings in all, a relative error below 3e-6.
FLOAT32_MARGIN = 3e-6

# vectors, N, k: 2,300 vectors in all, from 25 to 4096 values, k from 5 to 40
SIZES = [(270, 25, 5), (270, 25, 20), (210, 40, 10), (210, 49, 40), (270, 100, 20), (210, 144, 33), (180, 256, 10)]
SIZES += [(240, 576, 20), (210, 576, 10), (180, 576, 5), (30, 1000, 40), (12, 2304, 20), (8, 4096, 40)]
DISTRIBUTIONS = ["normal", "lognormal", "student"]


def draw(distribution: str, count: int, n: int, seed: int) -> np.ndarray:
    """`count` random vectors of `n` values."""
    rng = np.random.default_rng([seed, n, DISTRIBUTIONS.index(distribution)])
    if distribution == "normal":
        return rng.normal(size=(count, n))
    if distribution == "lognormal":
        return rng.lognormal(sigma=1.5, size=(count, n))
    return rng.standard_t(1.5, size=(count, n))


def sklearn_lof(row: np.ndarray, k: int) -> np.ndarray:
    """Factors as scikit-learn computes them, in the precision of `row`."""
    model = LocalOutlierFactor(n_neighbors=k, contamination="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # n_neighbors is larger than the number of samples
        labels = model.fit_predict(row[:, None])
    factors = -model.negative_outlier_factor_
    assert model.offset_ == -THRESHOLD
    assert np.array_equal(labels == -1, factors > THRESHOLD)
    return factors


def has_tied_boundary(row: np.ndarray, k: int) -> bool:
    """True if for some value the k-th neighbour on the left is as far, to 1e-12, as the next one on the right."""
    ordered = np.sort(row.astype(np.float64))
    n, k = len(ordered), min(k, len(ordered) - 1)
    for left in range(k + 1):  # `left` neighbours on the left and k - left on the right; the next one on either side
        inner = np.arange(left, n - (k - left))
        to_last_left = ordered[inner] - ordered[inner - left]
        right_next = np.full(len(inner), np.inf)
        reachable = inner + (k - left) + 1 < n
        right_next[reachable] = ordered[inner[reachable] + (k - left) + 1] - ordered[inner[reachable]]
        if left and np.any(np.abs(to_last_left - right_next) <= 1e-12 * to_last_left):
            return True
    return False


def compare_labels(rows: np.ndarray, k: int, got: np.ndarray, margin: float) -> tuple[int, int, int, int]:
    """Compare labels with scikit-learn row by row; (compared, left out, tied rows, outliers among the compared)."""
    compared = left_out = tied = outliers = 0
    for row, factors in zip(rows, got, strict=True):
        if has_tied_boundary(row, k):
            tied += 1
            continue
        expected = sklearn_lof(row, k)
        sure = np.abs(expected / THRESHOLD - 1) > margin
        np.testing.assert_allclose(factors, expected, rtol=margin)
        assert np.array_equal(factors[sure] > THRESHOLD, expected[sure] > THRESHOLD)
        compared, left_out = compared + int(sure.sum()), left_out + int((~sure).sum())
        outliers += int((expected[sure] > THRESHOLD).sum())
    return compared, left_out, tied, outliers


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("count", "n", "k"), SIZES)
def test_float64_labels_and_factors_equal_scikit_learn(distribution: str, count: int, n: int, k: int) -> None:
    rows = draw(distribution, count // 3, n, seed=0)
    got = local_outlier_factor(torch.from_numpy(rows), k)
    assert got.shape == rows.shape
    assert got.dtype == torch.float64
    compared, left_out, tied, outliers = compare_labels(rows, k, got.numpy(), EXACT_MARGIN)
    assert tied == 0
    assert left_out <= 1e-3 * compared
    assert outliers > 0 or (n, k) == (49, 40)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("count", "n", "k"), [(60, 25, 5), (60, 100, 20), (60, 576, 20), (9, 2304, 10), (6, 4096, 40)]
)
def test_float32_values_are_compared_without_rounding_their_distances(
    distribution: str, count: int, n: int, k: int
) -> None:
    rows = draw(distribution, count // 3, n, seed=1).astype(np.float32)
    got = local_outlier_factor(torch.from_numpy(rows), k).to(torch.float64).numpy()
    compared, left_out, tied, outliers = compare_labels(rows.astype(np.float64), k, got, EXACT_MARGIN)
    assert tied <= len(rows) // 2  # float32 values lie on a grid, so that long vectors do tie now and then
    assert left_out <= 1e-3 * compared
    assert outliers > 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("count", "n", "k"), [(60, 25, 5), (60, 100, 20), (60, 576, 20), (9, 2304, 10), (6, 4096, 40)]
)
def test_float32_labels_equal_scikit_learn_in_float32(distribution: str, count: int, n: int, k: int) -> None:
    rows = draw(distribution, count // 3, n, seed=2).astype(np.float32)
    got = local_outlier_factor(torch.from_numpy(rows), k).to(torch.float64).numpy()
    compared, left_out, tied, _ = compare_labels(rows, k, got, FLOAT32_MARGIN)
    assert tied <= len(rows) // 2
    assert left_out <= 1e-3 * compared


def close_to_oracle(rows: np.ndarray, k: int) -> None:
    got = local_outlier_factor(torch.from_numpy(rows), k).numpy()
    for row, factors in zip(rows, got, strict=True):
        np.testing.assert_allclose(factors, lof_oracle(row, k), rtol=1e-9)


def test_oracle_equals_scikit_learn() -> None:
    for distribution in DISTRIBUTIONS:
        for n, k in ((25, 5), (100, 20), (8, 20)):
            for row in draw(distribution, 3, n, seed=3):
                np.testing.assert_allclose(lof_oracle(row, k), sklearn_lof(row, k), rtol=1e-12)


def test_oracle_by_hand() -> None:
    # k = 1, values 0 1 3 3.5: nearest 1, 0, 3.5, 3; radii 1 1 .5 .5; densities 1 1 2 2; all factors 1
    np.testing.assert_allclose(lof_oracle([0, 1, 3, 3.5], 1), [1, 1, 1, 1], rtol=1e-9)
    # k = 1, values 0 1 10: nearest 1, 0, 1; reachability 1 1 9; the last factor 1 / (1 / 9)
    np.testing.assert_allclose(lof_oracle([10, 1, 0], 1), [9, 1, 1], rtol=1e-9)
    # k = 2, values 0 1 2 4 with ties: the neighbours of 2 are 1 and (left first) 0
    # radii 2 1 2 3; mean reachabilities (1 + 2) / 2, (2 + 2) / 2, (1 + 2) / 2, (2 + 3) / 2
    expected = [
        (2 / 4 + 2 / 3) / 2 * 1.5,
        (2 / 3 + 2 / 3) / 2 * 2,
        (2 / 4 + 2 / 3) / 2 * 1.5,
        (2 / 3 + 2 / 4) / 2 * 2.5,
    ]
    np.testing.assert_allclose(lof_oracle([0, 1, 2, 4], 2), expected, rtol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10, 20, 40])
@pytest.mark.parametrize("n", [2, 3, 5, 21, 25, 64, 150])
def test_equals_the_loop_without_ties(n: int, k: int) -> None:
    close_to_oracle(np.concatenate([draw(d, 3, n, seed=4) for d in DISTRIBUTIONS]), k)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10, 20, 40])
@pytest.mark.parametrize(("n", "levels"), [(7, 3), (12, 40), (30, 8), (64, 30), (64, 1000), (150, 60)])
def test_equals_the_loop_with_ties(n: int, levels: int, k: int) -> None:
    rng = np.random.default_rng([5, n, levels])
    close_to_oracle(rng.integers(0, levels, size=(8, n)).astype(np.float64), k)


@pytest.mark.parametrize("k", [10, 20])
def test_equals_the_loop_on_saliency_of_many_magnitudes(k: int) -> None:
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(rng.normal(size=(6, 200)) * np.array([[0.5], [1], [2], [5], [20], [60]]))
    close_to_oracle(logits.softmax(dim=-1).numpy(), k)
    close_to_oracle(logits.float().softmax(dim=-1).double().numpy(), k)


def test_one_huge_value_does_not_blur_the_others() -> None:
    rng = np.random.default_rng(7)
    rows = rng.uniform(size=(4, 100))
    rows[:, 17] = np.array([1e3, 1e6, 1e9, -1e9])
    close_to_oracle(rows, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_finite_with_ties_constants_and_few_values(k: int, dtype: torch.dtype) -> None:
    ramp = torch.arange(30, dtype=dtype)
    rows = [torch.zeros(30), torch.full((30,), 1e-3), torch.ones(30) * 1e4, ramp // 7, (ramp > 28).to(dtype), ramp]
    for row in rows:
        factors = local_outlier_factor(row.to(dtype), k)
        assert torch.isfinite(factors).all()
        assert (factors >= 0).all()
    for constant in rows[:3]:
        torch.testing.assert_close(
            local_outlier_factor(constant.to(dtype), k).double(), torch.ones(30, dtype=torch.float64)
        )
    for n in range(2, 22):
        assert torch.isfinite(local_outlier_factor(ramp[:n] ** 2, k)).all()


@pytest.mark.parametrize("n", [2, 3, 10, 20])
def test_fewer_values_than_neighbours_take_all_the_others(n: int) -> None:
    values = torch.from_numpy(draw("normal", 5, n, seed=8))
    assert torch.equal(local_outlier_factor(values, 20), local_outlier_factor(values, n - 1))
    for row, factors in zip(values.numpy(), local_outlier_factor(values, 20).numpy(), strict=True):
        np.testing.assert_allclose(factors, sklearn_lof(row, 20), rtol=1e-9)


def test_a_single_value_has_factor_one() -> None:
    assert torch.equal(
        local_outlier_factor(torch.tensor([[3.0], [0.0]]), 20).double(), torch.ones(2, 1, dtype=torch.float64)
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 7)])
def test_empty_input_gives_empty_output(shape: tuple[int, ...]) -> None:
    assert local_outlier_factor(torch.zeros(shape), 20).shape == shape


def test_a_batch_equals_row_by_row() -> None:
    values = torch.from_numpy(draw("lognormal", 12, 100, seed=9)).reshape(3, 4, 100)
    batched = local_outlier_factor(values, 20)
    assert batched.shape == values.shape
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(batched[i, j], local_outlier_factor(values[i, j], 20), rtol=1e-12, atol=0)


@pytest.mark.parametrize("garbage", [0.0, -1e6, 1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("k", [5, 20])
def test_entries_that_are_not_valid_do_not_count(k: int, garbage: float) -> None:
    rng = np.random.default_rng(10)
    values = torch.from_numpy(draw("student", 9, 80, seed=10))
    counts = [0, 1, 2, 4, 21, 22, 50, 79, 80]
    valid = torch.zeros(9, 80, dtype=torch.bool)
    for row, count in enumerate(counts):
        valid[row, torch.from_numpy(rng.permutation(80)[:count])] = True
    factors = local_outlier_factor(values.masked_fill(~valid, garbage), k, valid=valid)
    assert factors.shape == values.shape
    for row in range(9):
        alone = local_outlier_factor(values[row][valid[row]], k)
        torch.testing.assert_close(factors[row][valid[row]], alone, rtol=1e-9, atol=0)


def test_a_mask_of_all_valid_changes_nothing() -> None:
    values = torch.from_numpy(draw("normal", 4, 60, seed=11))
    everything = torch.ones(4, 60, dtype=torch.bool)
    assert torch.equal(local_outlier_factor(values, 10), local_outlier_factor(values, 10, valid=everything))


def test_permuting_the_values_permutes_the_factors() -> None:
    values = torch.from_numpy(draw("student", 6, 120, seed=12))
    order = torch.from_numpy(np.random.default_rng(12).permutation(120))
    permuted = local_outlier_factor(values[:, order], 20)
    torch.testing.assert_close(permuted, local_outlier_factor(values, 20)[:, order], rtol=1e-9, atol=0)


def test_shift_and_positive_scale_change_nothing() -> None:
    values = torch.from_numpy(draw("normal", 6, 120, seed=13))
    factors = local_outlier_factor(values, 20)
    torch.testing.assert_close(local_outlier_factor(values + 12.5, 20), factors, rtol=1e-6, atol=0)
    # the 1e-10 in the density is not scaled along, so the scales stay near one
    torch.testing.assert_close(local_outlier_factor(values * 50, 20), factors, rtol=1e-6, atol=0)


def test_the_input_is_left_as_it_was() -> None:
    values = torch.from_numpy(draw("normal", 2, 50, seed=14))
    before = values.clone()
    local_outlier_factor(values, 10, valid=torch.ones(2, 50, dtype=torch.bool))
    assert torch.equal(values, before)
