"""The settings to compare with: chance, pooling and the base tile keep what they say, whatever the batch."""

import itertools
import math

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, assert_same_records
from cases import make_case
from next_model import BATCHES, NEXT, encode

from reccomp_hf import TokenRecoveryConfig, recover_tokens
from reccomp_hf.core.methods.baselines import cell_grid

GRID, PATCHES = (12, 12), 144
BUDGETS = (1, 2, 7, 16, 36, 100, 143, 144, 0.05, 0.1, 0.25, 1.0)


def config(method, budget):
    return TokenRecoveryConfig(method=method, budget=budget)


def wanted(budget, patches=PATCHES):
    return budget if isinstance(budget, int) else max(1, math.floor(budget * patches + 0.5))


# ---- random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_random_keeps_exactly_the_budget_as_it_is(budget):
    case = make_case(n=PATCHES)
    output = case.recover(config("random", budget))
    assert output.counts.tolist() == [wanted(budget)] * 3
    assert torch.equal(output.visual_mask, output.cluster >= 0)
    assert not (output.text_mask | output.coverage_mask | output.centre_mask).any()
    for row in range(3):
        places = output.visual_mask[row].nonzero().flatten()
        assert torch.equal(output.places[row], places)
        assert torch.equal(output.tokens[row], case.hidden_states[row, places])


def test_random_depends_on_the_picture_alone():
    case = make_case(batch=6, n=PATCHES)
    output = case.recover(config("random", 30))
    for row in range(6):
        # Alone, without the question, in another place of the batch, and with the rounding of another order of sums.
        assert torch.equal(case.row(row).recover(config("random", 30)).visual_mask[0], output.visual_mask[row])
    assert torch.equal(case.without_text().recover(config("random", 30)).visual_mask, output.visual_mask)
    rounded = make_case(batch=6, n=PATCHES)
    rounded.hidden_states = rounded.hidden_states * (1 + 1e-7)
    assert torch.equal(rounded.recover(config("random", 30)).visual_mask, output.visual_mask)
    kept = [frozenset(row.nonzero().flatten().tolist()) for row in output.visual_mask]
    assert len(set(kept)) == 6
    # A larger budget keeps what a smaller one does.
    assert (case.recover(config("random", 40)).visual_mask | ~output.visual_mask).all()


def test_random_is_uniform():
    rows, budget = 4000, 36
    states = torch.randn(rows, PATCHES, 4, generator=torch.Generator().manual_seed(0))
    output = recover_tokens(
        states, states[:, 0], torch.cat([states[:, :1], states], 1), None, config("random", budget)
    )
    mask = output.visual_mask.double()
    share = budget / PATCHES
    spread = math.sqrt(share * (1 - share) / rows)
    assert (mask.mean(0) - share).abs().max() < 4.5 * spread
    assert abs(float((mask.mean(0) - share).pow(2).mean()) / spread**2 - 1) < 0.5  # nor is it more even than chance
    both = mask.T @ mask / rows  # pairs are kept together as often as without replacement
    both = both[~torch.eye(PATCHES, dtype=torch.bool)]
    expected = share * (budget - 1) / (PATCHES - 1)
    assert (both - expected).abs().max() < 5.5 * math.sqrt(expected * (1 - expected) / rows)


def test_random_tiles_of_one_content_differ():
    case = make_case(batch=1, n=PATCHES)
    twice = [torch.cat([part, part]) for part in (case.hidden_states, case.class_query, case.keys)]
    output = recover_tokens(*twice, None, config("random", 60), tiles=[2])
    assert int(output.counts.sum()) == 60
    assert not torch.equal(output.visual_mask[0], output.visual_mask[1])


# ---- pooling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "cells"),
    [(1, (1, 1)), (2, (1, 2)), (8, (2, 4)), (14, (3, 5)), (16, (4, 4)), (29, (5, 6)), (36, (6, 6)), (144, (12, 12))],
)
def test_the_cells_of_twelve_by_twelve(budget, cells):
    assert cell_grid(GRID, budget) == cells


def test_cells_are_near_the_budget_and_nearly_square():
    for budget in range(1, 577):
        down, across = cell_grid((24, 24), budget)
        assert abs(down * across - budget) <= max(3, 0.04 * budget), budget
        assert max(down, across) <= 2 * min(down, across) or 24 in (down, across)
        if math.isqrt(budget) ** 2 == budget:
            assert (down, across) == (math.isqrt(budget), math.isqrt(budget))
    assert cell_grid((1, 100), 7) == (1, 7)  # a row of patches has cells of any length


@pytest.mark.parametrize("budget", BUDGETS)
def test_pooling_is_the_mean_of_every_cell(budget):
    case = make_case(n=PATCHES)
    output = case.recover(config("pooling", budget))
    down, across = cell_grid(GRID, wanted(budget))
    assert output.counts.tolist() == [down * across] * 3
    cells = [[] for _ in range(down * across)]
    for row, column in itertools.product(range(12), range(12)):
        cells[row * down // 12 * across + column * across // 12].append(row * 12 + column)
    assert max(map(len, cells)) <= 2 * min(map(len, cells)) or budget == 7 or len(cells) > 36
    first = sorted((members[0], members) for members in cells)
    for number, (place, members) in enumerate(first):
        assert output.places[:, number].tolist() == [place] * 3
        assert (output.cluster[:, members] == number).all()
        mean = case.hidden_states[:, members].mean(1)
        torch.testing.assert_close(output.tokens[:, number], mean, rtol=1e-5, atol=1e-6)
    assert output.centre_mask.sum(-1).tolist() == [down * across] * 3
    assert not (output.visual_mask | output.text_mask | output.coverage_mask).any()


def test_pooling_by_the_side_and_by_the_budget_are_the_same():
    case = make_case(n=PATCHES)
    for method, budget in (("pooling_2x2", 36), ("pooling_3x3", 16)):
        assert_same_records(
            [case.recover(TokenRecoveryConfig(method=method))], [case.recover(config("pooling", budget))]
        )


def test_pooling_of_missing_patches():
    case = make_case(n=PATCHES)
    valid = torch.ones(3, PATCHES, dtype=torch.bool)
    valid[1, 36:] = False  # three rows of patches are left
    for budget in (16, 0.25):
        output = case.recover(config("pooling", budget), valid=valid)
        assert (output.cluster[1] >= 0).tolist() == valid[1].tolist()
        assert output.counts[0] == output.counts[2] == wanted(budget)
    assert output.counts[1] == 12  # two rows of six cells, the lower ones of half the height
    assert case.recover(config("pooling", 36), valid=valid).counts.tolist() == [36, 36, 36]


# ---- in a model ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_tiles_share_a_budget(rows):
    model, batch = NEXT.compressed(), encode(rows)
    _, layout = model._layout(batch["pixel_values"], batch["image_sizes"])
    valid = [int(part.sum()) for part in layout.valid.split(layout.tiles)]
    for budget in (40, 0.1, 10_000 // 20):
        setting = {"method": "random", "budget": budget}
        counts = [int(record.counts.sum()) for record in model.recover(**batch, token_recovery=setting)]
        assert counts == [min(patches, wanted(budget, patches)) for patches in valid]
        pooled = model.recover(**batch, token_recovery={**setting, "method": "pooling"})
        for record, count, tiles, patches in zip(pooled, counts, layout.tiles, valid, strict=True):
            assert int((record.cluster >= 0).sum()) == patches  # every patch is in a cell
            cells = int(record.counts.sum())
            assert tiles <= cells <= patches or tiles > patches / 100
            assert abs(cells - count) <= max(tiles * 3, 0.35 * count)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
@pytest.mark.parametrize("method", ["random", "pooling"])
def test_the_question_changes_nothing_and_is_not_needed(architecture, method):
    model, batch = architecture.compressed(), architecture.encode()
    setting = {"method": method, "budget": 20}
    records = model.recover(**batch, token_recovery=setting)
    bare = {name: value for name, value in batch.items() if not name.startswith("recovery")}
    assert_same_records(records, model.recover(**bare, token_recovery=setting))


@pytest.mark.parametrize("method", ["random", "pooling"])
def test_a_budget_is_needed(method):
    with pytest.raises(ValueError, match=f"method '{method}' needs a budget, got null"):
        TokenRecoveryConfig(method=method)


def test_a_method_with_a_count_of_its_own_takes_no_budget():
    with pytest.raises(ValueError, match="fixes the number of tokens itself"):
        TokenRecoveryConfig(method="pooling_2x2", budget=8)
