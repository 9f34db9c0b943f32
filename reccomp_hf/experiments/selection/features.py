"""Synthetic tensors for `recover_tokens`, with the sizes and the unevenness of CLIP ViT-L/14-336's features."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

PATCHES, WIDTH = 576, 1024


@dataclasses.dataclass(frozen=True)
class Features:
    """Arguments of `recover_tokens`, float32 on the CPU.

    Args:
        hidden_states: (B, N, C).
        class_query: (B, C).
        keys: (B, N + 1, C).
        text_similarity: (B, N).
    """

    hidden_states: Tensor
    class_query: Tensor
    keys: Tensor
    text_similarity: Tensor

    def __getitem__(self, rows: slice) -> Features:
        """Some of the images."""
        return Features(*(value[rows] for value in self.arguments()))

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors in the argument order of `recover_tokens`."""
        return self.hidden_states, self.class_query, self.keys, self.text_similarity


def make_features(batch: int, patches: int = PATCHES, width: int = WIDTH, seed: int = 0) -> Features:
    """Random features whose scores have outliers, about a tenth of the patches in all.

    The keys are random but for their part along the class token's query, which is set so that the attention's logits
    are normal with a tenth of them raised; the similarities are normal with 6 % of them raised.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def raised(share: float, low: float, high: float, *shape: int) -> Tensor:
        chosen = torch.rand(shape, generator=generator) < share
        return chosen * (low + (high - low) * torch.rand(shape, generator=generator))

    query, keys = normal(batch, width), normal(batch, patches + 1, width)
    logits = normal(batch, patches + 1) + raised(0.1, 1.5, 3.5, batch, patches + 1)
    length = query.norm(dim=-1, keepdim=True)  # (B, 1)
    direction = (query / length).unsqueeze(1)  # (B, 1, C)
    along = logits * width**0.5 / length - (keys @ direction.transpose(1, 2)).squeeze(-1)  # (B, N + 1)
    keys += along.unsqueeze(-1) * direction
    similarity = 0.2 + 0.03 * normal(batch, patches) + raised(0.06, 0.05, 0.15, batch, patches)
    return Features(normal(batch, patches, width), query, keys, similarity)


def one_thread() -> Any:
    """A context in which torch computes on one thread."""
    return _Threads(1)


class _Threads:
    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


__all__ = ["PATCHES", "WIDTH", "Features", "make_features", "one_thread"]
