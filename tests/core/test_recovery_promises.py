"""What recover_tokens promises whatever the settings, each promise one test, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    MASKS,
    RECOVERY_FIELDS,
    Case,
    check_against_oracle,
    make_case,
    mask_of_counts,
)
from oracle import cosine, upper_outliers

from reccomp_hf.core.configuration import TokenRecoveryConfig

# --- promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [0, 1, 8, 100])
@pytest.mark.parametrize("coverage", [0.0, 0.25, 1.0])
def test_a_budget_gives_exactly_that_many_tokens(coverage: float, merged: int) -> None:
    case = make_case(batch=2, n=36, c=8)
    for budget in range(1, 37):
        output = case.recover(TokenRecoveryConfig(budget=budget, coverage_share=coverage, merged_tokens=merged))
        assert output.counts.tolist() == [budget, budget]
        assert output.tokens.shape[1] == budget
        assert (output.centre_mask.sum(dim=1) == (0 if budget == 36 else min(merged, budget - 1))).all()
        assert (output.places >= 0).all()
        assert all(row.unique().tolist() == sorted(row.tolist()) for row in output.places)
        nothing_dropped = budget == 36 or min(merged, budget - 1) > 0
        assert bool((output.cluster >= 0).all()) == nothing_dropped


def test_a_share_rounds_half_up_for_every_number_of_patches() -> None:
    case = make_case(batch=1, n=50, c=8)
    for percent in range(1, 101):
        share = percent / 100
        for n in (1, 7, 50):
            part = Case(
                case.hidden_states[:, :n], case.class_query, case.keys[:, : n + 1], case.text_similarity[:, :n]
            )
            expected = max(1, math.floor(share * n + 0.5))
            assert part.recover(TokenRecoveryConfig(budget=share)).counts.tolist() == [expected], (share, n)


def test_a_share_counts_the_valid_patches_of_each_row() -> None:
    case, valid = make_case(batch=4, n=100), mask_of_counts([100, 50, 10, 1], 100)
    output = case.recover(TokenRecoveryConfig(budget=0.25), valid=valid)
    assert output.counts.tolist() == [25, 13, 3, 1]


@pytest.mark.parametrize("text", [True, False], ids=["text", "no_text"])
@pytest.mark.parametrize("n", [1, 2, 3, 20, 64, 100])
def test_dynamic_mode_accounts_for_every_valid_patch_exactly_once(n: int, text: bool) -> None:
    case = make_case(batch=4, n=n, c=8)
    case = case if text else case.without_text()
    valid = mask_of_counts([n, max(1, n // 2), max(1, n - 1), 1], n)
    output = case.recover(TokenRecoveryConfig(), valid=valid)
    assert torch.equal(output.cluster >= 0, valid)
    for b in range(4):
        assert output.cluster[b][valid[b]].unique().tolist() == list(range(int(output.counts[b])))


def test_coverage_by_content_keeps_the_mean_of_the_features() -> None:
    case = make_case(batch=8, n=144, c=16)
    units = torch.nn.functional.normalize(case.hidden_states, dim=-1)

    def gap(**fields: Any) -> float:
        kept = case.recover(
            TokenRecoveryConfig(budget=16, merged_tokens=0, coverage_share=1.0, **fields)
        ).coverage_mask
        mean = (units * kept.unsqueeze(-1)).sum(1) / 16
        return float((mean - units.mean(1)).norm(dim=-1).mean())

    assert gap(coverage_by="content") < 0.5 * gap(coverage_by="place")


def test_text_recovery_limited_to_outliers_leaves_the_others_to_coverage() -> None:
    case = make_case(batch=3, n=144)
    fields = {"budget": 100, "text_share": 1.0, "merged_tokens": 0, "coverage_share": 0.25}
    limited = case.recover(TokenRecoveryConfig(text_limit="outliers", coverage_by="content", **fields))
    assert not limited.visual_mask.any()
    for b in range(3):
        outliers = upper_outliers(range(144), case.text_similarity[b].numpy(), 20, 1.5)
        assert 0 < len(outliers) < 75
        assert int(limited.text_mask[b].sum()) == len(outliers)
        assert int(limited.coverage_mask[b].sum()) == 100 - len(outliers)
    few = case.recover(TokenRecoveryConfig(text_limit="outliers", **{**fields, "budget": 8}))
    assert few.text_mask.sum(-1).tolist() == [6, 6, 6]  # no more than the share, outliers or not
    flat = dataclasses.replace(case, text_similarity=torch.zeros(3, 144))
    assert not flat.recover(TokenRecoveryConfig(text_limit="outliers", **fields)).text_mask.any()


@pytest.mark.parametrize("fields", RECOVERY_FIELDS, ids=str)
def test_masks_are_disjoint_and_add_up_to_the_tokens(fields: dict[str, Any]) -> None:
    output = make_case().recover(TokenRecoveryConfig(**fields))
    total = sum(getattr(output, name).long() for name in MASKS)
    assert int(total.max()) == 1
    assert torch.equal(total.sum(dim=1), output.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", RECOVERY_FIELDS, ids=str)
def test_kept_tokens_are_their_features_bit_for_bit_in_raster_order(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    case = make_case(dtype=dtype)
    output = case.recover(TokenRecoveryConfig(**fields))
    kept = output.visual_mask | output.text_mask | output.coverage_mask
    for b in range(3):
        places = kept[b].nonzero().flatten()
        assert torch.equal(output.tokens[b, : len(places)], case.hidden_states[b, places])
        assert torch.equal(output.places[b, : len(places)], places)
        centres = output.centre_mask[b].nonzero().flatten()
        assert torch.equal(output.places[b, len(places) : int(output.counts[b])], centres)
        assert torch.equal(output.cluster[b, places], torch.arange(len(places)))
        assert torch.equal(output.cluster[b, centres], len(places) + torch.arange(len(centres)))


@pytest.mark.parametrize("fields", RECOVERY_FIELDS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(fields: dict[str, Any]) -> None:
    case, config = make_case(batch=4), TokenRecoveryConfig(**fields)
    output = case.recover(config)
    for b in range(4):
        alone, count = case.row(b).recover(config), int(output.counts[b])
        assert int(alone.counts) == count == alone.tokens.shape[1]
        for name in (*MASKS, "cluster"):
            assert torch.equal(getattr(alone, name)[0], getattr(output, name)[b])
        assert torch.equal(alone.places[0], output.places[b, :count])
        torch.testing.assert_close(alone.tokens[0], output.tokens[b, :count], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [100, 1.0])
def test_a_budget_of_all_tokens_returns_the_features_themselves(budget: float, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    output = case.recover(TokenRecoveryConfig(budget=budget))
    assert torch.equal(output.tokens, case.hidden_states)
    assert torch.equal(output.cluster, torch.arange(100).expand(3, -1))
    assert torch.equal(output.places, output.cluster)
    assert not output.centre_mask.any()


@pytest.mark.parametrize("fields", [{}, {"budget": 20}], ids=str)
def test_a_merged_token_is_the_saliency_weighted_mean_of_its_cluster(fields: dict[str, Any]) -> None:
    case = make_case()
    output = case.recover(TokenRecoveryConfig(**fields))
    sizes = []
    for b in range(3):
        for centre in output.centre_mask[b].nonzero().flatten():
            place = output.cluster[b, centre]
            members = output.cluster[b] == place
            weights = output.saliency[b, members].double()
            mean = (weights[:, None] * case.hidden_states[b, members].double()).sum(dim=0) / weights.sum()
            torch.testing.assert_close(output.tokens[b, place].double(), mean, rtol=1e-5, atol=1e-6)
            sizes.append(int(members.sum()))
    assert max(sizes) > 1


def test_merging_equal_features_gives_that_feature() -> None:
    case = make_case()
    case.hidden_states[:] = torch.arange(32.0)
    output = case.recover(TokenRecoveryConfig())
    for b, count in enumerate(output.counts.tolist()):
        torch.testing.assert_close(output.tokens[b, :count], case.hidden_states[b, :count])


@pytest.mark.parametrize(
    "fields", [{"outlier_neighbors": 5}, {"budget": 12, "merged_tokens": 4}, {"budget": 64}], ids=str
)
def test_the_gradient_reaches_the_features_and_nothing_else(fields: dict[str, Any]) -> None:
    case, config = make_case(batch=2, n=64, c=8), TokenRecoveryConfig(**fields)
    for x in vars(case).values():
        x.requires_grad_()
    output = case.recover(config)
    assert not output.saliency.requires_grad
    weights = torch.randn(output.tokens.shape, generator=torch.Generator().manual_seed(0))
    (output.tokens * weights).sum().backward()
    for x in (case.class_query, case.keys, case.text_similarity):
        assert x.grad is None or not x.grad.any()
    with torch.no_grad():  # tokens are linear in the features: a finite difference of any step is exact
        for b, j in ((0, int(output.places[0, 0])), (1, int(output.places[1, -1])), (0, 5), (1, 40)):
            for channel in (0, 7):
                moved = case.hidden_states.detach().clone()
                moved[b, j, channel] += 1.0
                change = dataclasses.replace(case, hidden_states=moved).recover(config).tokens - output.tokens
                expected = float((change * weights).sum())
                assert float(case.hidden_states.grad[b, j, channel]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    accounted = output.cluster >= 0
    assert torch.equal(case.hidden_states.grad.abs().sum(dim=-1) > 0, accounted)


def test_float64_features_pass_gradcheck() -> None:
    case = make_case(batch=2, n=30, c=4, dtype=torch.float64)
    config = TokenRecoveryConfig(outlier_neighbors=5, merge_neighbors=3)
    output = case.recover(config)
    assert output.tokens.dtype == torch.float64
    assert output.visual_mask.any()
    features = case.hidden_states.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: dataclasses.replace(case, hidden_states=h).recover(config).tokens, (features,)
    )


@pytest.mark.parametrize(
    "fields", [{}, {"outlier_neighbors": 3}, {"budget": 9}, {"budget": 0.5, "coverage_share": 0.3}], ids=str
)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_underflowing_saliency_stays_finite(scale: float, fields: dict[str, Any]) -> None:
    case = make_case(n=64)
    case.class_query *= scale
    output = case.recover(TokenRecoveryConfig(**fields))
    assert (output.saliency == 0).any()
    assert torch.isfinite(output.saliency).all()
    assert torch.isfinite(output.tokens).all()
    for b, count in enumerate(output.counts.tolist()):
        for place in range(count):  # a weighted mean, whatever its weights, lies between its members
            members = case.hidden_states[b, output.cluster[b] == place]
            assert (output.tokens[b, place] <= members.amax(dim=0) + 1e-5).all()
            assert (output.tokens[b, place] >= members.amin(dim=0) - 1e-5).all()
    if fields.get("budget") is None:
        assert (output.cluster >= 0).all()


def test_all_saliency_on_the_class_token_stays_finite() -> None:
    case = make_case(n=64)
    case.keys[:, 0] = case.class_query * 1e4
    for fields in ({}, {"budget": 9}):
        output = case.recover(TokenRecoveryConfig(**fields))
        assert not output.saliency.any()
        assert torch.isfinite(output.tokens).all()
        assert (output.cluster >= 0).all()


def test_zero_keys_stay_finite_and_join_the_first_centre() -> None:
    case = make_case(n=64)
    output = case.recover(TokenRecoveryConfig(budget=10, merged_tokens=4))
    dull = (output.cluster[0] >= 6) & ~output.centre_mask[0]
    j = int(dull.nonzero()[0])
    case.keys[0, j + 1] = 0
    output = check_against_oracle(case, TokenRecoveryConfig(budget=10, merged_tokens=4), own_saliency=False)
    assert torch.isfinite(output.tokens).all()
    assert not output.centre_mask[0, j]
    assert int(output.cluster[0, j]) == 6


def flat_case(n: int = 36, c: int = 8) -> Case:
    """One image whose patches all have the same key and text score."""
    h = torch.randn(1, n, c, generator=torch.Generator().manual_seed(0))
    return Case(h, torch.ones(1, c), torch.ones(1, n + 1, c), torch.ones(1, n))


def test_ties_go_to_the_lower_raster_index() -> None:
    output = flat_case().recover(TokenRecoveryConfig(budget=10, merged_tokens=3))
    assert output.visual_mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert output.text_mask[0].nonzero().flatten().tolist() == [4, 5, 6]
    assert output.centre_mask[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert output.cluster[0].tolist() == [*range(10), *[7] * 26]


def test_ties_among_valid_patches_go_to_the_lower_raster_index() -> None:
    valid = torch.ones(1, 36, dtype=torch.bool)
    valid[0, [0, 2, 8]] = False
    output = flat_case().recover(TokenRecoveryConfig(budget=10, merged_tokens=3), valid=valid)
    assert output.places[0].tolist() == [1, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert output.centre_mask[0].nonzero().flatten().tolist() == [10, 11, 12]


def test_dynamic_mode_without_outliers_merges_everything_into_one_token() -> None:
    case = flat_case()
    output = case.recover(TokenRecoveryConfig())
    assert output.counts.tolist() == [1]
    assert output.places.tolist() == [[0]]
    assert not (output.visual_mask | output.text_mask).any()
    assert output.cluster[0].tolist() == [0] * 36
    torch.testing.assert_close(output.tokens[:, 0], case.hidden_states.mean(dim=1))


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


def test_coverage_alone_starts_at_the_first_valid_patch() -> None:
    case, valid = make_case(batch=1, n=16, c=8), torch.ones(1, 16, dtype=torch.bool)
    valid[0, :2] = False
    config = TokenRecoveryConfig(budget=3, coverage_share=1.0, merged_tokens=0)
    assert case.recover(config).places.tolist() == [[0, 3, 15]]
    # from (0, 2) the farthest is (3, 0) at 13; then (3, 3), 9 away from the nearer of the two
    assert case.recover(config, valid=valid).places.tolist() == [[2, 12, 15]]


def test_the_inputs_are_left_as_they_were() -> None:
    case = make_case()
    before = [x.clone() for x in vars(case).values()]
    for fields in RECOVERY_FIELDS:
        case.recover(TokenRecoveryConfig(**fields))
    assert all(torch.equal(x, old) for x, old in zip(vars(case).values(), before, strict=True))


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_budget_above_the_number_of_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)budget.*101.*100|(?s:101.*100.*budget)"):
        make_case().recover(TokenRecoveryConfig(budget=101))


def test_a_row_with_fewer_valid_patches_than_an_int_budget_keeps_them_all() -> None:
    output = make_case().recover(TokenRecoveryConfig(budget=64), valid=mask_of_counts([100, 63, 80], 100))
    assert output.counts.tolist() == [64, 63, 64]


@pytest.mark.parametrize("shape", [(3, 101), (3, 99), (2, 100), (100,), (3, 100, 1)])
def test_text_similarity_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    case = dataclasses.replace(make_case(), text_similarity=torch.zeros(shape))
    with pytest.raises(ValueError, match="text_similarity") as error:
        case.recover(TokenRecoveryConfig())
    assert all(str(number) in str(error.value) for number in shape)


def test_keys_without_the_class_token_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="keys") as error:
        dataclasses.replace(case, keys=case.keys[:, 1:]).recover(TokenRecoveryConfig())
    assert "100" in str(error.value)
    assert "101" in str(error.value)


@pytest.mark.parametrize("name", ["class_query", "keys"])
def test_another_width_is_refused(name: str) -> None:
    case = make_case()
    narrow = dataclasses.replace(case, **{name: getattr(case, name)[..., :16]})
    with pytest.raises(ValueError, match=name) as error:
        narrow.recover(TokenRecoveryConfig())
    assert "16" in str(error.value)
    assert "32" in str(error.value)


def test_coverage_without_a_grid_on_patches_that_are_no_square_is_refused() -> None:
    config = TokenRecoveryConfig(budget=9, coverage_share=0.5)
    with pytest.raises(ValueError, match=r"grid|square") as error:
        make_case(n=99).recover(config)
    assert "99" in str(error.value)
    make_case(n=99).recover(TokenRecoveryConfig(budget=9))  # without coverage no grid is needed


def test_a_grid_of_another_size_is_refused() -> None:
    config = TokenRecoveryConfig(budget=9, coverage_share=0.5)
    with pytest.raises(ValueError, match="grid") as error:
        make_case().recover(config, grid=(9, 11))
    assert "100" in str(error.value)


def test_oracle_cosine_of_a_zero_vector_is_zero() -> None:
    assert cosine(np.zeros(3), np.ones(3)) == 0.0
    assert cosine(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(math.sqrt(0.5))
