"""Several questions about one picture in one sequence, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scene_questions import Question
from .tokenizers import EOS_ID, IMAGE_ID, PAD_ID

_BEFORE_PICTURE, _AFTER_PICTURE, _BEFORE_ANSWER = "USER: ", "\n{} ASSISTANT:", " {}"
_HIDDEN = -1e9  # added to the attention score of a token that must not be seen
_EOS_WEIGHT = 0.1  # of the token after an answer, which is always the same, in the loss
_READ_WEIGHT = 2.0  # of a letter: there are the fewest questions of that kind


@dataclass(frozen=True)
class Packed:
    """Sequences of a prefix, a picture of P tokens and the questions of B pictures, of L tokens in all.

    Attributes:
        prefix: (prefix,), token ids before the picture.
        input_ids: (B, L), questions and answers.
        position_ids: (B, prefix + P + L): every question goes on right behind the picture.
        attention_mask: (B, 1, prefix + P + L, prefix + P + L), zero or very negative.
        labels: (B, L), the next token where the loss has a weight.
        weights: (B, L), float, 0 where nothing is predicted.
    """

    prefix: Tensor
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    weights: Tensor


class Packer:
    """Packs questions for a decoder.

    Args:
        tokenizer: Of the decoder.
        picture: Number of tokens of a picture.
        device: Where the tensors go.
    """

    def __init__(self, tokenizer: Any, picture: int, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        whole: list[int] = tokenizer(f"{_BEFORE_PICTURE}<image>")["input_ids"]
        self._prefix = whole[: whole.index(IMAGE_ID)]
        self._before = len(self._prefix) + picture
        self._tokens = cache(self._encode)

    def pack(self, asked: Sequence[Sequence[Question]]) -> Packed:
        """Pack the questions about B pictures, padding at the end."""
        rows = [[self._tokens(question.text, question.answer) for question in items] for items in asked]
        length = max(sum(len(tokens) for tokens in row) for row in rows)
        ids = np.full((len(rows), length), PAD_ID)
        labels = np.zeros_like(ids)
        positions = np.zeros_like(ids)
        owners = np.full_like(ids, -1)  # which question a token belongs to
        weights = np.zeros(ids.shape, np.float32)
        for number, (row, items) in enumerate(zip(rows, asked, strict=True)):
            start = 0
            for owner, (tokens, question) in enumerate(zip(row, items, strict=True)):
                stop = start + len(tokens)
                ids[number, start:stop] = tokens
                owners[number, start:stop] = owner
                positions[number, start:stop] = np.arange(len(tokens))
                labels[number, stop - 2 : stop] = tokens[-1], EOS_ID
                weights[number, stop - 2 : stop] = _READ_WEIGHT if question.kind == "read" else 1.0, _EOS_WEIGHT
                start = stop
        behind = torch.arange(self._before).expand(len(rows), -1)
        position_ids = torch.cat([behind, torch.from_numpy(positions) + self._before], dim=1)
        return Packed(
            prefix=torch.tensor(self._prefix, device=self._device),
            input_ids=torch.from_numpy(ids).to(self._device),
            position_ids=position_ids.to(self._device),
            attention_mask=self._mask(torch.from_numpy(owners).to(self._device)),
            labels=torch.from_numpy(labels).to(self._device),
            weights=torch.from_numpy(weights).to(self._device),
        )

    def _encode(self, text: str, answer: str) -> tuple[int, ...]:
        """Tokens of a question and of its answer, which must be one token."""
        encode = self._tokenizer
        asked = encode(_AFTER_PICTURE.format(text), add_special_tokens=False)["input_ids"]
        answered = encode(_BEFORE_ANSWER.format(answer), add_special_tokens=False)["input_ids"]
        if len(answered) != 1:
            raise ValueError(f"The answer {answer!r} must be one token of the tokenizer, but is {len(answered)}.")
        return (*asked, *answered)

    def _mask(self, owners: Tensor) -> Tensor:
        """Everything is causal; a question (B, L) sees the prefix, the picture and itself."""
        total = self._before + owners.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=owners.device).tril()
        seen = causal.expand(len(owners), -1, -1).clone()
        seen[:, self._before :, self._before :] &= owners[:, :, None] == owners[:, None, :]
        mask = torch.zeros(len(owners), 1, total, total, dtype=torch.bfloat16, device=owners.device)
        return mask.masked_fill_(~seen[:, None], _HIDDEN)


__all__ = ["Packed", "Packer"]
