"""Random images whose scores have peaks, and the comparison of an output with the oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from oracle import recover_oracle
from torch import Tensor

from reccomp_hf.core.choosing import recover_tokens
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.features import TokenRecoveryOutput

MASKS = ("visual_mask", "text_mask", "coverage_mask", "centre_mask")
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5}}


@dataclasses.dataclass
class Case:
    """Arguments of recover_tokens before the config."""

    hidden_states: Tensor
    class_query: Tensor
    keys: Tensor
    text_similarity: Tensor | None

    def recover(self, config: TokenRecoveryConfig, **named: Any) -> TokenRecoveryOutput:
        """Call the package, with made-up attention between patches, class features and words if none are given."""
        made_up = {name: getattr(self, name) for name in ("received", "class_state", "word_similarity")}
        named = {**made_up, **named}
        return recover_tokens(self.hidden_states, self.class_query, self.keys, self.text_similarity, config, **named)

    @property
    def received(self) -> Tensor:
        """(B, 2, N) float32, some attention of patches in two blocks, from their keys alone."""
        return self.keys[:, 1:, :2].float().transpose(1, 2).softmax(-1)

    @property
    def class_state(self) -> Tensor:
        """(B, C), some features of the class token, the mean of the patches'."""
        return self.hidden_states.mean(1)

    @property
    def word_similarity(self) -> Tensor:
        """(B, 5, N) float32, some cosines of words and patches, from the patches' keys; the last row is padding."""
        cosines = self.keys[:, 1:, 2:7].float().transpose(1, 2) / 9
        cosines[:, -1] = -torch.inf
        return cosines

    def row(self, b: int) -> Case:
        """Image `b` alone."""
        text = None if self.text_similarity is None else self.text_similarity[b : b + 1]
        return Case(self.hidden_states[b : b + 1], self.class_query[b : b + 1], self.keys[b : b + 1], text)

    def without_text(self) -> Case:
        """The same images without a question."""
        return dataclasses.replace(self, text_similarity=None)

    def to(self, dtype: torch.dtype) -> Case:
        """The same images in another precision."""
        return Case(*(None if x is None else x.to(dtype) for x in vars(self).values()))


def draw_image(rng: np.random.Generator, n: int, c: int) -> tuple[np.ndarray, ...]:
    """Features, class query, keys and text scores of one image: a sixth of the patches salient, an eighth asked."""
    q = rng.normal(size=c)
    keys = rng.normal(size=(n + 1, c))
    logits = 0.3 * rng.normal(size=n + 1)
    hot = rng.permutation(n)[: n // 6]
    logits[hot + 1] += 0.5 + rng.exponential(1.2, size=len(hot))
    keys += np.outer(logits * math.sqrt(c) - keys @ q, q) / (q @ q)
    s = 0.2 + 0.02 * rng.normal(size=n)
    asked = rng.permutation(n)[: n // 8]
    s[asked] += rng.exponential(0.1, size=len(asked))
    return rng.normal(size=(n, c)), q, keys, s


def make_case(batch: int = 3, n: int = 100, c: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """A batch of random images."""
    images = [draw_image(np.random.default_rng([seed, b, n, c]), n, c) for b in range(batch)]
    return Case(*(torch.from_numpy(np.stack(parts)).to(dtype) for parts in zip(*images, strict=True)))


def mask_of_counts(counts: list[int], n: int, seed: int = 0) -> Tensor:
    """A mask (B, N) with the given number of valid patches in each row, scattered."""
    valid = torch.zeros(len(counts), n, dtype=torch.bool)
    for row, count in enumerate(counts):
        valid[row, torch.from_numpy(np.random.default_rng([seed, row]).permutation(n)[:count])] = True
    return valid


def oracle_row(
    case: Case, b: int, config: TokenRecoveryConfig, valid: Tensor | None = None, **named: Any
) -> dict[str, Any]:
    """The oracle's answer for row `b`."""
    h, q, keys = (x[b].double().numpy() for x in (case.hidden_states, case.class_query, case.keys))
    s = None if case.text_similarity is None else case.text_similarity[b].float().numpy()
    return recover_oracle(h, q, keys, s, config, valid=None if valid is None else valid[b].tolist(), **named)


def check_against_oracle(
    case: Case, config: TokenRecoveryConfig, *, own_saliency: bool = True, valid: Tensor | None = None, **named: Any
) -> TokenRecoveryOutput:
    """Compare every field of every row; `own_saliency=False` gives the oracle's stages the package's saliency."""
    output = case.recover(config, valid=valid, **named)
    check_form(case, output, tight=valid is None or config.budget is None)
    for b in range(len(case.hidden_states)):
        expected = oracle_row(case, b, config, valid, **named)
        np.testing.assert_allclose(output.saliency[b].numpy(), expected["saliency"], rtol=2e-5, atol=1e-7)
        if not own_saliency:
            expected = oracle_row(case, b, config, valid, saliency=output.saliency[b].numpy(), **named)
        for name in MASKS:
            assert getattr(output, name)[b].tolist() == expected[name], (name, b)
        count = expected["counts"]
        assert int(output.counts[b]) == count
        assert output.cluster[b].tolist() == expected["cluster"]
        assert output.places[b].tolist() == expected["places"] + [-1] * (output.places.shape[1] - count)
        tokens = torch.from_numpy(expected["tokens"])
        torch.testing.assert_close(output.tokens[b, :count].double(), tokens, **TOLERANCE[case.hidden_states.dtype])
        assert not output.tokens[b, count:].any()
    return output


def check_form(case: Case, output: TokenRecoveryOutput, tight: bool) -> None:
    """Shapes and dtypes; `tight`: as long as the longest row (a budget's padded length may not read the mask)."""
    batch, n, c = case.hidden_states.shape
    longest = int(output.counts.max())
    assert output.tokens.shape[1] == longest or (not tight and longest < output.tokens.shape[1] <= n)
    longest = output.tokens.shape[1]
    assert output.tokens.shape == (batch, longest, c)
    assert output.tokens.dtype == case.hidden_states.dtype
    assert output.counts.shape == (batch,)
    assert output.places.shape == (batch, longest)
    assert output.counts.dtype == output.places.dtype == output.cluster.dtype == torch.int64
    assert output.saliency.dtype == torch.float32
    assert output.saliency.shape == output.cluster.shape == (batch, n)
    for name in MASKS:
        assert getattr(output, name).shape == (batch, n)
        assert getattr(output, name).dtype == torch.bool
    if case.text_similarity is None:
        assert output.text_similarity is None
    else:
        assert torch.equal(output.text_similarity, case.text_similarity.float())


DYNAMIC = [{}, {"outlier_neighbors": 5, "merge_neighbors": 4}, {"outlier_threshold": 1.2}, {"merged_tokens": 0}]
BUDGETS = [{"budget": b, "merged_tokens": m} for b in (1, 2, 9, 24, 99, 100, 0.03, 0.25, 1.0) for m in (0, 8)]
SHARES = [{"budget": 40, "coverage_share": c, "text_share": t} for c in (0.0, 0.25, 1.0) for t in (0.0, 0.3, 1.0)]
SHARES += [{"budget": 0.37, "coverage_share": 0.25, "merged_tokens": 3}, {"budget": 30, "merged_tokens": 29}]
LIMITED = [
    {
        "budget": budget,
        "text_share": share,
        "text_limit": limit,
        "coverage_share": 0.25,
        "coverage_by": by,
        "merged_tokens": m,
    }
    for budget, share, m in ((1, 1.0, 0), (20, 1.0, 0), (0.37, 0.5, 4), (99, 1.0, 3), (100, 1.0, 0))
    for limit, by in (("outliers", "content"), ("outliers", "place"), ("share", "content"))
]
DIVERSE = [
    {"budget": budget, "text_share": share, "text_limit": limit, "text_by": "diversity", "coverage_by": "content"}
    for budget, share in ((1, 1.0), (9, 0.5), (20, 1.0), (0.37, 0.5), (100, 1.0))
    for limit in ("share", "outliers", "half_outliers", "half_or_few")
]
RECOVERY_FIELDS = [*DYNAMIC, *BUDGETS, *SHARES, *LIMITED, *DIVERSE]
