"""The `random` method: the same choice for a seed, and uniform, independent choices across seeds."""

from __future__ import annotations

import math

import torch

from reccomp_hf import TokenRecoveryConfig, recover_tokens


def kept_at_random(states, seed, budget=36, **named):
    config = TokenRecoveryConfig(method="random", budget=budget, method_options={} if seed is None else {"seed": seed})
    keys = torch.cat([states[:, :1], states], 1)
    return recover_tokens(states, states[:, 0], keys, None, config, **named)


def test_seed_0_is_the_choice_of_versions_without_seeds():
    # Whole numbers, so that every machine compares them alike; the places were written down before seeds came.
    states = (torch.arange(2 * 64 * 8) * 7919 % 1009).float().view(2, 64, 8)
    for seed in (None, 0):
        places = kept_at_random(states, seed, 10).places.tolist()
        assert places == [[3, 4, 21, 25, 32, 36, 41, 42, 43, 56], [1, 9, 14, 20, 23, 36, 41, 51, 59, 60]]
        tiles = kept_at_random(states, seed, 10, tiles=[2]).places.tolist()
        assert tiles == [[4, 25, 41, 56, -1, -1], [10, 13, 16, 21, 27, 48]]


def test_other_seeds_choose_otherwise_and_as_if_independently():
    states = torch.randn(400, 144, 4, generator=torch.Generator().manual_seed(0))
    masks = []
    for seed in (0, 1, 2, 2**63 - 1):
        output = kept_at_random(states, seed)
        assert output.counts.tolist() == [36] * 400
        assert torch.equal(output.visual_mask, kept_at_random(states, seed).visual_mask)
        assert torch.equal(output.visual_mask[7], kept_at_random(states[7:8], seed).visual_mask[0])
        masks.append(output.visual_mask)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            both = (one & other).sum(-1).double()  # hypergeometric: 9 of 36, variance 36 * 1/4 * 3/4 * 108/143
            assert abs(float(both.mean()) - 9) < 5 * math.sqrt(5.098 / 400)
            assert 0.7 < float(both.var()) / 5.098 < 1.3


def test_every_seed_is_uniform():
    rows, share = 4000, 0.25
    states = torch.randn(rows, 144, 4, generator=torch.Generator().manual_seed(1))
    for seed in (1, 12345):
        often = kept_at_random(states, seed).visual_mask.double().mean(0)
        spread = math.sqrt(share * (1 - share) / rows)
        assert (often - share).abs().max() < 4.5 * spread
        assert abs(float((often - share).pow(2).mean()) / spread**2 - 1) < 0.5  # nor more even than chance
    one = states[:1].expand(600, -1, -1)[:1]  # a picture, over many seeds
    often = torch.cat([kept_at_random(one, seed).visual_mask for seed in range(600)]).double().mean(0)
    assert (often - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 600)
