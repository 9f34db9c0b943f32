"""The patches that recover_tokens keeps and merges: counts, stages, ties, and inputs that it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import MASKS, RECOVERY_FIELDS, Case, make_case, mask_of_counts
from oracle import upper_outliers

from reccomp_hf.core.configuration import TokenRecoveryConfig

# --- counts ----------------------------------------------------------------------------------------------------------


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


def test_a_row_with_fewer_valid_patches_than_an_int_budget_keeps_them_all() -> None:
    output = make_case().recover(TokenRecoveryConfig(budget=64), valid=mask_of_counts([100, 63, 80], 100))
    assert output.counts.tolist() == [64, 63, 64]


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


@pytest.mark.parametrize("fields", RECOVERY_FIELDS, ids=str)
def test_masks_are_disjoint_and_add_up_to_the_tokens(fields: dict[str, Any]) -> None:
    output = make_case().recover(TokenRecoveryConfig(**fields))
    total = sum(getattr(output, name).long() for name in MASKS)
    assert int(total.max()) == 1
    assert torch.equal(total.sum(dim=1), output.counts)


# --- stages ----------------------------------------------------------------------------------------------------------


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


def test_text_recovery_limited_to_half_of_the_outliers_takes_a_few_patches_at_least() -> None:
    fields = {"budget": 40, "text_share": 1.0, "merged_tokens": 0, "text_limit": "half_or_few"}
    for n, few in ((24, 0), (25, 1), (144, 3), (576, 12)):  # 2 % of the patches, rounded
        case = make_case(batch=1, n=n)
        flat = dataclasses.replace(case, text_similarity=torch.zeros(1, n))
        config = TokenRecoveryConfig(**{**fields, "budget": min(40, n - 1)})
        assert int(flat.recover(config).text_mask.sum()) == few
        outliers = upper_outliers(range(n), case.text_similarity[0].numpy(), 20, 1.5)
        assert int(case.recover(config).text_mask.sum()) == max(few, len(outliers) // 2)
    flat = dataclasses.replace(make_case(batch=1, n=144), text_similarity=torch.zeros(1, 144))
    small = flat.recover(TokenRecoveryConfig(**{**fields, "budget": 2}))
    assert (int(small.text_mask.sum()), int(small.counts)) == (2, 2)  # no more than the budget


def test_coverage_alone_starts_at_the_first_valid_patch() -> None:
    case, valid = make_case(batch=1, n=16, c=8), torch.ones(1, 16, dtype=torch.bool)
    valid[0, :2] = False
    config = TokenRecoveryConfig(budget=3, coverage_share=1.0, merged_tokens=0)
    assert case.recover(config).places.tolist() == [[0, 3, 15]]
    # from (0, 2) the farthest is (3, 0) at 13; then (3, 3), 9 away from the nearer of the two
    assert case.recover(config, valid=valid).places.tolist() == [[2, 12, 15]]


# --- rows and inputs -------------------------------------------------------------------------------------------------


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


def test_the_inputs_are_left_as_they_were() -> None:
    case = make_case()
    before = [x.clone() for x in vars(case).values()]
    for fields in RECOVERY_FIELDS:
        case.recover(TokenRecoveryConfig(**fields))
    assert all(torch.equal(x, old) for x, old in zip(vars(case).values(), before, strict=True))


# --- ties ------------------------------------------------------------------------------------------------------------


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


# --- errors ---------------------------------------------------------------------------------------------------------

SPREAD = {"budget": 9, "coverage_share": 0.5}
# Name -> the tensors of a case (3, 100, 32) replaced, the config's fields, other arguments, what the message names.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "budget": ({}, {"budget": 101}, {}, ("budget", "101", "100")),
    "no patches": ({"hidden_states": torch.zeros(3, 0, 32)}, {}, {}, ("hidden_states", "(3, 0, 32)")),
    "keys": ({"keys": torch.zeros(3, 100, 32)}, {}, {}, ("keys", "class token", "101", "(3, 100, 32)")),
    "keys' width": ({"keys": torch.zeros(3, 101, 16)}, {}, {}, ("keys", "32", "(3, 101, 16)")),
    "query's width": ({"class_query": torch.zeros(3, 16)}, {}, {}, ("class_query", "32", "(3, 16)")),
    "heads": ({}, {}, {"num_heads": 5}, ("num_heads", "32", "5")),
    "tiles": ({}, {}, {"tiles": [2, 2]}, ("tiles", "3 rows", "[2, 2]")),
    "grid": ({}, SPREAD, {"grid": (9, 11)}, ("grid", "(9, 11)", "99", "100")),
    **{
        f"text similarity {shape}": ({"text_similarity": torch.zeros(shape)}, {}, {}, ("text_similarity", str(shape)))
        for shape in ((3, 101), (3, 99), (2, 100), (100,), (3, 100, 1))
    },
}


@pytest.mark.parametrize(("tensors", "fields", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_inputs_that_do_not_fit_are_refused(
    tensors: dict[str, Any], fields: dict[str, Any], arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    case = dataclasses.replace(make_case(), **tensors)
    with pytest.raises(ValueError) as error:
        case.recover(TokenRecoveryConfig(**fields), **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_coverage_needs_a_grid_where_patches_form_no_square() -> None:
    with pytest.raises(ValueError, match=r"grid of the 99 patches"):
        make_case(n=99).recover(TokenRecoveryConfig(**SPREAD))
    make_case(n=99).recover(TokenRecoveryConfig(budget=9))  # without coverage no grid is needed
    make_case(n=99).recover(TokenRecoveryConfig(**SPREAD), grid=(9, 11))
