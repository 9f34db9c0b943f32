"""Random images for the comparison methods, and the comparison of an output with their oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import MASKS, TOLERANCE, check_form, make_case
from oracle import saliency_oracle
from oracle_methods import METHODS, method_oracles

from reccomp_hf import TokenRecoveryConfig

DYNAMIC = ("prumerge", "prumerge_plus", "trim")
MERGING = (*DYNAMIC, "visionzip")
HEADS, WIDTH, PROJECTED = 4, 64, 24  # no head is as wide as there are heads
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_method = pytest.mark.parametrize("method", METHODS)


def each_budget(*budgets):
    """Pairs of a method and a budget; None, the dynamic number of tokens, for methods that have one."""
    pairs = [(method, budget) for method in METHODS for budget in budgets if budget is not None or method in DYNAMIC]
    return pytest.mark.parametrize(("method", "budget"), pairs)


def draw(n, batch=3, seed=0, dtype=torch.float32):
    """Random images, and what the projector might make of their patches."""
    projected = np.stack([np.random.default_rng([9, seed, b, n]).normal(size=(n, PROJECTED)) for b in range(batch)])
    return make_case(batch, n, WIDTH, seed, dtype), torch.from_numpy(projected).to(dtype)


def check(method, drawn, own_saliency=False, valid=None, tiles=None, **fields):
    """Compare every field of every row with the oracle's, which starts from the package's saliency or its own."""
    (case, projected), config = drawn, TokenRecoveryConfig(method=method, **fields)
    output = case.recover(config, num_heads=HEADS, projected=projected, valid=valid, tiles=tiles)
    check_form(case, output, tight=(valid is None and tiles is None) or config.budget is None)
    h, q, keys, p = (x.double().numpy() for x in (case.hidden_states, case.class_query, case.keys, projected))
    exists = np.ones(h.shape[:2], dtype=bool) if valid is None else valid.numpy()
    heads = HEADS if config.visual_heads == "mean" else 1
    saliency = np.stack([saliency_oracle(q[b], keys[b], exists[b], heads) for b in range(len(h))])
    np.testing.assert_allclose(output.saliency.numpy(), saliency, rtol=2e-5, atol=1e-7)
    saliency = saliency if own_saliency else output.saliency.numpy()
    s = case.text_similarity.float().numpy()
    received = case.received.double().numpy()
    named = {"num_heads": HEADS, "valid": exists, "tiles": tiles, "projected": p, "received": received}
    named["class_state"] = case.class_state.double().numpy()
    named["words"] = case.word_similarity.double().numpy()
    for b, row in enumerate(method_oracles(h, keys, saliency, s, config, **named)):
        assert row["gap"] > 1e-6, f"too near to a tie to compare, draw others: {row['gap']} with {fields}"
        count = row["counts"]
        assert int(output.counts[b]) == count
        for name in MASKS:
            assert getattr(output, name)[b].tolist() == row[name], (name, b)
        assert output.cluster[b].tolist() == row["cluster"]
        assert output.places[b].tolist() == row["places"] + [-1] * (output.places.shape[1] - count)
        assert not output.tokens[b, count:].any()
        kept = slice(row["leading"], row["leading"] + int(output.kept_mask[b].sum()))
        assert torch.equal(output.tokens[b, kept], case.hidden_states[b, row["places"][kept]])
        assert not row["leading"] or torch.equal(output.tokens[b, 0], case.class_state[b])
        tokens = torch.from_numpy(row["tokens"])
        torch.testing.assert_close(output.tokens[b, :count].double(), tokens, **TOLERANCE[output.tokens.dtype])
    return output
