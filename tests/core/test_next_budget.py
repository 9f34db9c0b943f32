"""The budget that the tiles of a LLaVA-NeXT image share, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, make_case, mask_of_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import budget_split, herding, limited, merge, nearest_centre, saliency_oracle, text_patches, top
from torch import Tensor

from reccomp_hf.core.choosing import recover_tokens
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.features import TokenRecoveryOutput

some = settings(max_examples=60, deadline=None, derandomize=True)


def spread_oracle(kept: list[int], free: list[int], count: int, area: int, columns: int) -> list[int]:
    """Farthest points where patches of different tiles are infinitely far from each other."""
    kept, free, chosen = list(kept), sorted(free), []
    for _ in range(count):

        def distance(j: int) -> float:
            near = [divmod(i % area, columns) for i in kept if i // area == j // area]
            y, x = divmod(j % area, columns)
            return min(((y - row) ** 2 + (x - column) ** 2 for row, column in near), default=math.inf)

        best = max(free, key=lambda j: (distance(j), -j))
        kept.append(best)
        chosen.append(best)
        free.remove(best)
    return chosen


def seats_oracle(mass: list[float], left: list[int], count: int) -> list[int]:
    """D'Hondt: one seat after the other to the highest average, no more than a tile has patches left."""
    seats = [0] * len(mass)
    for _ in range(count):
        free = [tile for tile in range(len(mass)) if seats[tile] < left[tile]]
        seats[max(free, key=lambda tile: (mass[tile] / (seats[tile] + 1), -tile))] += 1
    return seats


def image_oracle(
    case: Case, a: np.ndarray, valid: list[list[bool]], config: TokenRecoveryConfig, columns: int
) -> dict[str, list[list[int]]]:
    """Patches of every stage for one image of several tiles (rows of `case`), counted over all tiles."""
    tiles, n = a.shape
    patches = [tile * n + j for tile in range(tiles) for j in range(n) if valid[tile][j]]
    relative = np.zeros(tiles * n)
    for tile in range(tiles):
        mine = [j for j in range(n) if valid[tile][j]]
        for j in mine:
            relative[tile * n + j] = a[tile, j] / (math.fsum(a[tile, mine]) / len(mine))
    text = None if case.text_similarity is None else case.text_similarity.float().numpy().flatten()
    n_visual, n_text, n_coverage, n_merged = budget_split(config, len(patches), text is not None)
    stages: dict[str, Any] = {"visual_mask": top(patches, relative, n_visual)}
    rest = [j for j in patches if j not in stages["visual_mask"]]
    n_text, n_coverage = limited(config, text, len(patches), rest, n_text, n_coverage)
    features = case.hidden_states.double().numpy().reshape(tiles * n, -1)
    stages["text_mask"] = text_patches(features, text, rest, n_text, config)
    rest = [j for j in rest if j not in stages["text_mask"]]
    kept = stages["visual_mask"] + stages["text_mask"]
    if config.coverage_by == "content":
        stages["coverage_mask"] = herding(features, patches, rest, n_coverage)
    else:
        stages["coverage_mask"] = spread_oracle(kept, rest, n_coverage, n, columns)
    rest = [j for j in rest if j not in stages["coverage_mask"]]
    by_tile = [[j for j in rest if j // n == tile] for tile in range(tiles)]
    # Relative saliency adds up to the number of patches: a tile of which nothing was taken has exactly that left.
    mass = [
        sum(row) - math.fsum(relative[j] for j in patches if j // n == tile and j not in rest)
        for tile, row in enumerate(valid)
    ]
    seats = seats_oracle(mass, [len(mine) for mine in by_tile], n_merged)
    centres = [top(mine, relative, count) for mine, count in zip(by_tile, seats, strict=True)]
    return {**stages, "centre_mask": [j for mine in centres for j in mine]}


def check_image(case: Case, output: TokenRecoveryOutput, valid: Tensor, config: Any, columns: int) -> None:
    """Compare one image's tiles, every field, with the oracle."""
    rows, n = valid.shape
    expected = image_oracle(case, output.saliency.double().numpy(), valid.tolist(), config, columns)
    for name, members in expected.items():
        assert getattr(output, name).flatten().nonzero().flatten().tolist() == sorted(members), name
    for tile in range(rows):
        h, q, keys = (x[tile].double().numpy() for x in (case.hidden_states, case.class_query, case.keys))
        a = saliency_oracle(q, keys, valid[tile].tolist())
        np.testing.assert_allclose(output.saliency[tile].numpy(), a, rtol=2e-5, atol=1e-7)
        stages = ("visual_mask", "text_mask", "coverage_mask")
        kept = sorted(j % n for name in stages for j in expected[name] if j // n == tile)
        centres = sorted(j % n for j in expected["centre_mask"] if j // n == tile)
        places, cluster = kept + centres, [-1] * n
        for j in valid[tile].nonzero().flatten().tolist():
            if j in kept:
                cluster[j] = kept.index(j)
            elif centres:
                centre = j if j in centres else nearest_centre(j, centres, keys)
                cluster[j] = len(kept) + centres.index(centre)
        assert output.cluster[tile].tolist() == cluster
        assert output.counts[tile] == len(places)
        assert output.places[tile].tolist() == places + [-1] * (output.places.shape[1] - len(places))
        tokens = [h[j] for j in kept]
        tokens += [merge([j for j in range(n) if cluster[j] == cluster[c]], h, a) for c in centres]
        wanted = torch.zeros_like(output.tokens[tile], dtype=torch.float64)
        wanted[: len(places)] = torch.from_numpy(np.array(tokens).reshape(len(places), h.shape[1]))
        torch.testing.assert_close(output.tokens[tile].double(), wanted, rtol=1e-5, atol=1e-5)


def check_batch(case: Case, config: TokenRecoveryConfig, tiles: list[int], valid: Tensor | None) -> None:
    n = case.hidden_states.shape[1]
    columns = math.isqrt(n)
    output = case.recover(config, tiles=tiles, valid=valid)
    valid = torch.ones(sum(tiles), n, dtype=torch.bool) if valid is None else valid
    assert not output.visual_mask[~valid].any()
    assert (output.cluster[~valid] == -1).all()
    start = 0
    for size, image in zip(tiles, output.split(tiles), strict=True):
        rows = slice(start, start + size)
        mine = Case(*(None if x is None else x[rows] for x in vars(case).values()))
        check_image(mine, image, valid[rows], config, columns)
        assert int(image.counts.sum()) == sum(budget_split_of(config, valid[rows], case.text_similarity is not None))
        start += size


def budget_split_of(config: TokenRecoveryConfig, valid: Tensor, has_text: bool) -> tuple[int, ...]:
    total = int(valid.sum())
    if isinstance(config.budget, int) and config.budget >= total:
        return (total,)
    return budget_split(config, total, has_text)


TILES = [1, 3, 5, 2]
COUNTS = [25, 25, 15, 10, 20, 25, 5, 0, 24, 25, 20]  # patches that unpadding leaves of 25, tile by tile
SHARES: list[dict[str, Any]] = [
    {"budget": 12},
    {"budget": 20, "coverage_share": 0.4},
    {"budget": 0.5, "coverage_share": 0.25, "merged_tokens": 3},
    {"budget": 0.03},
    {"budget": 15, "text_share": 0.0, "merged_tokens": 0},
    {"budget": 24, "text_share": 1.0, "merged_tokens": 23},
    {"budget": 10, "coverage_share": 1.0, "merged_tokens": 1},
    {"budget": 1.0},
    {"budget": 24, "text_share": 1.0, "text_limit": "outliers", "coverage_share": 0.25, "coverage_by": "content"},
    {"budget": 0.4, "text_limit": "outliers", "outlier_neighbors": 5, "merged_tokens": 2},
    {"budget": 10, "text_share": 0.5, "text_by": "diversity", "coverage_share": 0.25},
    {
        "budget": 0.3,
        "text_share": 1.0,
        "text_limit": "half_or_few",
        "text_by": "diversity",
        "coverage_by": "content",
    },
]


@pytest.mark.parametrize("unpadded", [False, True], ids=["all", "unpadded"])
@pytest.mark.parametrize("fields", SHARES, ids=str)
def test_tiles_share_a_budget(fields: dict[str, Any], unpadded: bool) -> None:
    case = make_case(sum(TILES), 25, 8, seed=3)
    # Pictures whose tiles differ in how peaked they are: the raw class attention would favour some tiles.
    case.class_query *= torch.linspace(0.2, 3, sum(TILES)).unsqueeze(-1)
    valid = mask_of_counts(COUNTS, 25) if unpadded else None
    config = TokenRecoveryConfig(**fields)
    check_batch(case, config, TILES, valid)
    check_batch(case.without_text(), config, TILES, valid)


@pytest.mark.parametrize("counts", [[9, 9, 9, 9], [9, 6, 3, 0]], ids=["all", "unpadded"])
def test_every_budget_is_exact(counts: list[int]) -> None:
    tiles, valid = [3, 1], mask_of_counts(counts, 9)
    case = make_case(4, 9, 8, seed=5)
    image_sizes = [sum(counts[:3]), counts[3]]
    for budget in range(1, 29):  # one more than the largest image has
        for fields in ({}, {"coverage_share": 0.5, "merged_tokens": 2}, {"merged_tokens": 0}, {"merged_tokens": 40}):
            output = case.recover(TokenRecoveryConfig(budget=budget, **fields), tiles=tiles, valid=valid)
            got = [int(output.counts[:3].sum()), int(output.counts[3])]
            assert got == [min(budget, size) for size in image_sizes], (budget, fields)
    with pytest.raises(ValueError, match="only 9 patches"):
        case.recover(TokenRecoveryConfig(budget=10), valid=valid)


@some
@given(
    seed=st.integers(0, 10**6),
    tiles=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    budget=st.one_of(st.integers(1, 9), st.floats(0.01, 1.0)),
    coverage=st.sampled_from([0.0, 0.3, 1.0]),
    merged=st.integers(0, 9),
)
def test_random_images_share_a_budget(seed: int, tiles: list[int], budget: Any, coverage: float, merged: int) -> None:
    case = make_case(sum(tiles), 9, 8, seed=seed)
    counts = np.random.default_rng(seed).integers(0, 10, sum(tiles)).tolist()
    first = 0
    for size in tiles:  # a base tile is whole
        counts[first] = 9
        first += size
    config = TokenRecoveryConfig(budget=budget, coverage_share=coverage, merged_tokens=merged)
    check_batch(case, config, tiles, mask_of_counts(counts, 9, seed))


def test_an_image_of_a_batch_is_chosen_as_alone() -> None:
    case, valid = make_case(sum(TILES), 25, 8, seed=9), mask_of_counts(COUNTS, 25)
    for fields in (*SHARES, {}, {"method": "pooling_2x2"}, {"method": "base_tile"}):
        config, start = TokenRecoveryConfig(**fields), 0
        for size, image in zip(TILES, case.recover(config, tiles=TILES, valid=valid).split(TILES), strict=True):
            rows = slice(start, start + size)
            mine = (x[rows] for x in vars(case).values())
            alone = recover_tokens(*mine, config, tiles=[size], valid=valid[rows])
            assert torch.equal(alone.cluster, image.cluster)
            assert torch.equal(alone.places[:, : image.places.shape[1]], image.places)
            torch.testing.assert_close(alone.tokens[:, : image.tokens.shape[1]], image.tokens, rtol=1e-5, atol=1e-5)
            start += size


def test_untouched_tiles_share_merged_tokens_by_number_not_by_rounding() -> None:
    """Nothing is taken of eight tiles out of nine: equal shares, the first tiles get what cannot be divided."""
    for seed in range(40):
        case = make_case(9, 100, 8, seed=seed).without_text()
        output = case.recover(TokenRecoveryConfig(budget=13, merged_tokens=12), tiles=[9])
        seats = output.centre_mask.sum(-1).tolist()
        first = output.visual_mask.any(-1).tolist().index(True)
        others = [count for tile, count in enumerate(seats) if tile != first]
        assert sum(seats) == 12
        assert others == sorted(others, reverse=True)
