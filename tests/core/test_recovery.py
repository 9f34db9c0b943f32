"""recover_tokens equals the plain loop in oracle.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import MASKS, RECOVERY_FIELDS, Case, check_against_oracle, make_case, mask_of_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import budget_split, cosine, farthest_points, top, upper_outliers

from reccomp_hf.core.configuration import TokenRecoveryConfig

# --- the oracle itself, by hand --------------------------------------------------------------------------------------


def test_oracle_budget_split_by_hand() -> None:
    def split(n: int, has_text: bool = True, **fields: Any) -> tuple[int, ...]:
        return budget_split(TokenRecoveryConfig(**fields), n, has_text)

    assert split(576, budget=64) == (28, 28, 0, 8)
    assert split(576, budget=64, coverage_share=0.25) == (21, 21, 14, 8)
    assert split(576, budget=65) == (29, 28, 0, 8)
    assert split(576, False, budget=64) == (56, 0, 0, 8)
    assert split(576, budget=1) == (1, 0, 0, 0)
    assert split(576, budget=2) == (1, 0, 0, 1)
    assert split(64, budget=64, merged_tokens=8) == (32, 32, 0, 0)
    assert split(10, budget=0.25, merged_tokens=0) == (2, 1, 0, 0)
    assert split(10, budget=0.01) == (1, 0, 0, 0)
    assert split(10, budget=1.0) == (5, 5, 0, 0)


def test_oracle_farthest_points_by_hand() -> None:
    # 3 x 4: from 0 the far corner 11 (13 away); then 2, 3, 8 and 9 are all 4 away: the lowest index
    assert farthest_points([0], range(1, 12), 2, columns=4) == [11, 2]
    assert farthest_points([], [2, 5, 7], 1, columns=4) == [2]
    assert farthest_points([4], [0, 2, 6, 8], 4, columns=3) == [0, 2, 6, 8]


def test_oracle_counts_outliers_and_then_takes_the_top() -> None:
    # 40 values close together, one alone above them, and three close to each other above that one
    scores = np.array([*np.linspace(0, 1, 40), 3.0, 9.0, 9.01, 9.02])
    outliers = upper_outliers(range(44), scores, 2, 1.5)
    assert outliers == [40]
    assert top(range(44), scores, len(outliers)) == [43]


def test_oracle_cosine_of_a_zero_vector_is_zero() -> None:
    assert cosine(np.zeros(3), np.ones(3)) == 0.0
    assert cosine(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(math.sqrt(0.5))


# --- equal to the oracle ---------------------------------------------------------------------------------------------


def is_dynamic(fields: dict[str, Any]) -> bool:
    return "budget" not in fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [True, False], ids=["text", "no_text"])
@pytest.mark.parametrize("fields", RECOVERY_FIELDS, ids=str)
def test_equals_the_oracle(fields: dict[str, Any], text: bool, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    case = case if text else case.without_text()
    output = check_against_oracle(case, TokenRecoveryConfig(**fields))
    if is_dynamic(fields):
        assert output.visual_mask.any(dim=1).all()
        assert output.text_mask.any(dim=1).all() == text
        assert int(output.centre_mask.sum(dim=1).max()) > 1
        assert len(set(output.counts.tolist())) > 1


@pytest.mark.parametrize("heads", ["joint", "mean"])
@pytest.mark.parametrize("fields", [{}, {"budget": 24}, {"budget": 0.2, "coverage_share": 0.25}], ids=str)
def test_equals_the_oracle_for_either_reading_of_the_heads(fields: dict[str, Any], heads: str) -> None:
    case = make_case(n=144, seed=1)
    output = check_against_oracle(case, TokenRecoveryConfig(visual_heads=heads, **fields), num_heads=4)
    assert output.visual_mask.any(dim=1).all()
    other = case.recover(TokenRecoveryConfig(visual_heads="mean" if heads == "joint" else "joint"), num_heads=4)
    assert not torch.allclose(output.saliency, other.saliency, rtol=1e-3)


def test_one_head_averaged_is_the_joint_head() -> None:
    case = make_case()
    joint = case.recover(TokenRecoveryConfig(), num_heads=4).saliency
    torch.testing.assert_close(case.recover(TokenRecoveryConfig(visual_heads="mean"), num_heads=1).saliency, joint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [True, False], ids=["text", "no_text"])
@pytest.mark.parametrize("heads", ["joint", "mean"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"outlier_neighbors": 4, "merge_neighbors": 2},
        {"budget": 8, "merged_tokens": 3},
        {"budget": 10, "coverage_share": 0.5, "merged_tokens": 0},
        {"budget": 0.3, "coverage_share": 0.25},
        {"budget": 1.0},
    ],
    ids=str,
)
def test_equals_the_oracle_where_rows_have_different_valid_patches(
    fields: dict[str, Any], heads: str, text: bool, dtype: torch.dtype
) -> None:
    case = make_case(batch=5, n=120, seed=2, dtype=dtype)
    case = case if text else case.without_text()
    valid = mask_of_counts([120, 100, 64, 30, 10], 120)
    for x in (case.hidden_states, case.keys[:, 1:]):
        x[~valid] = 50.0
    config = TokenRecoveryConfig(visual_heads=heads, **fields)
    output = check_against_oracle(case, config, valid=valid, num_heads=4, grid=(10, 12))
    for name in MASKS:
        assert not (getattr(output, name) & ~valid).any()
    assert (output.cluster[~valid] == -1).all()
    assert not output.saliency[~valid].any()
    if is_dynamic(fields):
        assert output.visual_mask[:3].any(dim=1).all()


def test_a_row_with_invalid_patches_equals_the_valid_patches_alone() -> None:
    case, valid = make_case(batch=2, n=100, seed=3), mask_of_counts([100, 70], 100)
    output = case.recover(TokenRecoveryConfig(), valid=valid)
    keep = valid[1].nonzero().flatten()
    alone = Case(
        case.hidden_states[1:, keep],
        case.class_query[1:],
        torch.cat([case.keys[1:, :1], case.keys[1:, 1:][:, keep]], dim=1),
        case.text_similarity[1:, keep],
    ).recover(TokenRecoveryConfig())
    count = int(alone.counts)
    assert int(output.counts[1]) == count
    assert torch.equal(output.places[1, :count], keep[alone.places[0]])
    assert torch.equal(output.cluster[1, keep], alone.cluster[0])
    torch.testing.assert_close(output.tokens[1, :count], alone.tokens[0])


@settings(derandomize=True, deadline=None, max_examples=400, database=None)
@given(
    rows=st.integers(1, 15),
    columns=st.integers(1, 10),
    batch=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8]),
    budget=st.one_of(st.none(), st.integers(1, 150), st.floats(0.001, 1.0)),
    fields=st.fixed_dictionaries(
        {
            "text_share": st.floats(0, 1),
            "coverage_share": st.floats(0, 1),
            "merged_tokens": st.integers(0, 12),
            "outlier_neighbors": st.integers(1, 25),
            "merge_neighbors": st.integers(1, 12),
            "outlier_threshold": st.sampled_from([1.2, 1.5, 2.0]),
            "visual_heads": st.sampled_from(["joint", "mean"]),
            "text_limit": st.sampled_from(["share", "outliers", "half_outliers", "half_or_few"]),
            "coverage_by": st.sampled_from(["place", "content"]),
        }
    ),
    text=st.booleans(),
    masked=st.booleans(),
    levels=st.sampled_from([0, 0, 6]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_oracle_for_any_shape(
    rows: int,
    columns: int,
    batch: int,
    heads: int,
    width: int,
    budget: float | None,
    fields: dict[str, Any],
    text: bool,
    masked: bool,
    levels: int,
    seed: int,
) -> None:
    n, rng = rows * columns, np.random.default_rng(seed)
    case = make_case(batch, n, heads * width, seed)
    case = case if text else case.without_text()
    if levels and text:  # tied text scores
        case.text_similarity = (case.text_similarity * 10 * levels).round() / 16
    counts = rng.integers(1, n + 1, size=batch).tolist() if masked else [n] * batch
    if isinstance(budget, int):
        budget = min(budget, *counts)
    if budget is None:
        fields = {**fields, "coverage_share": 0.0}
    config = TokenRecoveryConfig(budget=budget, **fields)
    valid = mask_of_counts(counts, n, seed) if masked else None
    check_against_oracle(case, config, own_saliency=False, valid=valid, num_heads=heads, grid=(rows, columns))


def test_the_sum_of_outliers_counts_and_the_top_is_taken() -> None:
    """One patch stands alone in the middle and is the outlier; the token goes to the most salient one all the same."""
    logits = torch.tensor([0.0, *torch.linspace(0, 1, 40).tolist(), 3.0, 4.0, 4.001, 4.002])
    n, c = 44, 4
    keys = torch.zeros(1, n + 1, c)
    keys[0, :, 0] = logits * math.sqrt(c)
    keys[0, :, 1:] = torch.randn(n + 1, 3, generator=torch.Generator().manual_seed(0))
    case = Case(torch.randn(1, n, c, generator=torch.Generator().manual_seed(1)), torch.eye(c)[:1], keys, None)
    config = TokenRecoveryConfig(outlier_neighbors=2, merge_neighbors=2)
    output = check_against_oracle(case, config)
    row = output.saliency[0].numpy()
    outliers = upper_outliers(range(n), row, 2, 1.5)
    chosen = output.visual_mask[0].nonzero().flatten().tolist()
    assert 0 < len(outliers) == len(chosen)
    assert chosen != outliers
    assert chosen == sorted(top(range(n), row, len(outliers)))


def test_text_recovers_only_what_the_visual_stage_left() -> None:
    """Scores of patches the visual stage took neither count as outliers nor hide others."""
    case = make_case(batch=1, n=100, seed=4)
    visual = case.recover(TokenRecoveryConfig()).visual_mask[0]
    assert visual.any()
    plain = check_against_oracle(case, TokenRecoveryConfig())
    case.text_similarity[0, visual] = 1e3 + torch.arange(float(visual.sum()))
    loud = check_against_oracle(case, TokenRecoveryConfig())
    assert plain.text_mask.any()
    assert torch.equal(plain.text_mask, loud.text_mask)


@pytest.mark.parametrize(("grid", "n"), [((4, 9), 36), ((9, 4), 36), ((1, 36), 36), ((6, 6), 36), (None, 36)])
def test_coverage_spreads_over_the_given_grid(grid: tuple[int, int] | None, n: int) -> None:
    case = make_case(batch=2, n=n, c=8, seed=5)
    config = TokenRecoveryConfig(budget=9, coverage_share=0.5, merged_tokens=1)
    output = check_against_oracle(case, config, grid=grid)
    assert output.coverage_mask.sum(dim=1).tolist() == [4, 4]
