"""The choice of tokens in straightforward code: an image at a time, scikit-learn, a loop over the centres.

`recover_tokens` is timed against these. `released_loop` computes the tokens of method `authors` in the steps of the
paper's released code: three fits of scikit-learn's local outlier factor on the CPU, and for every centre a copy of all
other tokens and of their keys, their similarities, the 32 best of them, and their sum. `plain_loop` computes those of
method `recoverable`, with the same fits and a loop over the centres, but copies nothing in the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.configuration import TokenRecoveryConfig
from ...core.methods.authors import NEIGHBORS_MERGED, TEXT_WEIGHT

Loop = Callable[[Tensor, Tensor, Tensor, Tensor, TokenRecoveryConfig], Tensor]
"""states (N, C), class query (C,), keys (N + 1, C), text similarity (N,), config -> tokens (K, C)."""
_Floats = npt.NDArray[np.floating]
_Bools = npt.NDArray[np.bool_]


def plain_loop(
    states: Tensor, class_query: Tensor, keys: Tensor, similarity: Tensor, config: TokenRecoveryConfig
) -> Tensor:
    """The tokens (K, C) of one image by the dynamic mode of method `recoverable`."""
    saliency, question = _saliency(class_query, keys).numpy(), similarity.numpy()
    everything = np.arange(len(saliency))
    count = int(_above(saliency, config.outlier_neighbors, config.outlier_threshold).sum())
    visual = _best(everything, saliency, count)
    rest = np.setdiff1d(everything, visual)
    count = int(_above(question[rest], config.outlier_neighbors, config.outlier_threshold).sum())
    text = _best(rest, question, count)
    rest = np.setdiff1d(rest, text)
    centres = rest[_above(saliency[rest], config.merge_neighbors, config.outlier_threshold)]
    centres = centres if len(centres) else _best(rest, saliency, 1)
    directions = normalize(keys[1:], dim=-1)
    rest_directions = directions[torch.from_numpy(rest)]
    nearest = torch.stack([rest_directions @ directions[centre] for centre in centres]).argmax(0).numpy()
    nearest[np.searchsorted(rest, centres)] = np.arange(len(centres))
    merged = []
    for number in range(len(centres)):
        members = torch.from_numpy(rest[nearest == number])
        weights = torch.from_numpy(saliency)[members]
        merged.append((weights / weights.sum()) @ states[members])
    kept = np.sort(np.concatenate([visual, text]))
    return torch.cat([states[torch.from_numpy(kept)], torch.stack(merged)])


def released_loop(
    states: Tensor, class_query: Tensor, keys: Tensor, similarity: Tensor, config: TokenRecoveryConfig
) -> Tensor:
    """The tokens (K, C) of one image by method `authors`, whose file explains its oddities."""
    attention = _saliency(class_query, keys)
    saliency, question = attention.numpy(), similarity.numpy().copy()
    everything, size = np.arange(len(saliency)), len(saliency)
    threshold = config.outlier_threshold
    share = float((_factors(saliency, config.outlier_neighbors) > threshold).mean())
    visual = _best(everything, saliency, int(size * share))
    question[visual] = question.min()
    share = float((_factors(question, config.outlier_neighbors) > threshold).mean())
    text = _best(everything, question, int((size - len(visual)) * share))
    kept = np.union1d(visual, text)
    rest = np.setdiff1d(everything, kept)
    share = float((_factors(saliency[rest], config.merge_neighbors) > threshold).mean())
    order = np.argsort(-saliency[rest], kind="stable")[: int(keys.shape[-1] * share)]  # places within the rest
    tokens = [states[torch.from_numpy(kept)]]
    if len(order) == 0:
        return tokens[0]
    directions = normalize(keys[1:], dim=-1)[: len(rest)]
    rest_states, rest_attention = states[torch.from_numpy(rest)], attention[torch.from_numpy(rest)]
    bonus = TEXT_WEIGHT * torch.from_numpy(question)[torch.from_numpy(rest)]
    for place in order:
        score = _without(directions, place) @ directions[place] + _without(bonus, place)
        near = score.topk(min(NEIGHBORS_MERGED, len(rest) - 1)).indices
        sum_of_near = _without(rest_attention, place)[near] @ _without(rest_states, place)[near]
        tokens.append((rest_states[place] + sum_of_near).unsqueeze(0))
    others = torch.ones(len(rest), dtype=torch.bool)
    others[torch.from_numpy(order)] = False
    return torch.cat([*tokens, (rest_attention[others] @ rest_states[others]).unsqueeze(0)])


def _without(values: Tensor, place: int) -> Tensor:
    """All entries but one."""
    return torch.cat([values[:place], values[place + 1 :]])


def _saliency(class_query: Tensor, keys: Tensor) -> Tensor:
    """(N,) attention of the class token to the patches, one head as wide as the model."""
    return (keys @ class_query / keys.shape[-1] ** 0.5).softmax(0)[1:]


def _above(values: _Floats, neighbors: int, threshold: float) -> _Bools:
    """Outliers above the median."""
    return (_factors(values, neighbors) > threshold) & (values > np.median(values))


def _factors(values: _Floats, neighbors: int) -> _Floats:
    """Local outlier factors by scikit-learn."""
    model = _scikit_learn()(n_neighbors=min(neighbors, len(values) - 1))
    model.fit(values.astype(np.float64).reshape(-1, 1))
    return -np.asarray(model.negative_outlier_factor_)


def _best(among: Sequence[int] | npt.NDArray[np.int64], scores: _Floats, count: int) -> npt.NDArray[np.int64]:
    """Those of highest score; of equal scores the lower index first."""
    indices = np.asarray(among)
    return indices[np.argsort(-scores[indices], kind="stable")[:count]]


def _scikit_learn() -> type:
    try:
        from sklearn.neighbors import LocalOutlierFactor
    except ImportError as error:
        raise ImportError(
            "The plain loop needs scikit-learn, which comes with the tests' requirements: "
            "pip install 'reccomp_hf[test]'."
        ) from error
    return LocalOutlierFactor


__all__ = ["Loop", "plain_loop", "released_loop"]
