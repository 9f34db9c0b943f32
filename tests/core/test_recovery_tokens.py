"""The tokens that recover_tokens returns: kept features, merged means, gradients, extreme scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import RECOVERY_FIELDS, check_against_oracle, make_case

from reccomp_hf.core.configuration import TokenRecoveryConfig


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


# --- gradients -------------------------------------------------------------------------------------------------------


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


# --- extreme scores --------------------------------------------------------------------------------------------------


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
