"""Several conversations about one image in one sequence, with attention masked between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...demo.scene_questions import Question
from .tokenizers import EOS_ID, IMAGE_ID, PAD_ID

_BEFORE_PICTURE, _AFTER_PICTURE, _LATER, _ANSWER = "USER: ", "\n{} ASSISTANT:", "USER: {} ASSISTANT:", " {}"
_HIDDEN = -1e9  # added to the attention score of a hidden token
_EOS_WEIGHT = 0.5  # loss weight of the token after an answer, which is always the same
_READ_WEIGHT = 2.0  # loss weight of a letter: questions of that kind are the fewest


Conversation: TypeAlias = Sequence[Question]
"""Questions, each of which sees the earlier ones and their right answers."""


@dataclass(frozen=True)
class Packed:
    """Sequences of a prefix, an image of P tokens and the conversations about B images, of L tokens in all.

    Attributes:
        prefix: (prefix,), token ids before the image.
        input_ids: (B, L), questions and answers.
        position_ids: (B, prefix + P + L): every conversation starts right after the image.
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
    """Packs conversations for a decoder.

    Args:
        tokenizer: The decoder's tokenizer.
        picture: Number of tokens of an image.
        device: The device of the tensors.
    """

    def __init__(self, tokenizer: Any, picture: int, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        whole: list[int] = tokenizer(f"{_BEFORE_PICTURE}<image>")["input_ids"]
        self._prefix = whole[: whole.index(IMAGE_ID)]
        self._before = len(self._prefix) + picture
        self._tokens = cache(self._encode)

    def pack(self, held: Sequence[Sequence[Conversation]]) -> Packed:
        """Pack the conversations about B images, padding at the end."""
        rows = [[self._turns(conversation) for conversation in conversations] for conversations in held]
        length = max(sum(len(tokens) for turns in row for tokens, _ in turns) for row in rows)
        ids = np.full((len(rows), length), PAD_ID)
        labels = np.zeros_like(ids)
        positions = np.zeros_like(ids)
        owners = np.full_like(ids, -1)  # the conversation that a token belongs to
        weights = np.zeros(ids.shape, np.float32)
        for number, row in enumerate(rows):
            stop = 0
            for owner, turns in enumerate(row):
                first = stop
                for tokens, weight in turns:
                    start, stop = stop, stop + len(tokens)
                    ids[number, start:stop] = tokens
                    labels[number, stop - 2 : stop] = tokens[-1], EOS_ID
                    weights[number, stop - 2 : stop] = weight, _EOS_WEIGHT
                owners[number, first:stop] = owner
                positions[number, first:stop] = np.arange(stop - first)
        start_ids = torch.arange(self._before).expand(len(rows), -1)
        position_ids = torch.cat([start_ids, torch.from_numpy(positions) + self._before], dim=1)
        return Packed(
            prefix=torch.tensor(self._prefix, device=self._device),
            input_ids=torch.from_numpy(ids).to(self._device),
            position_ids=position_ids.to(self._device),
            attention_mask=self._mask(torch.from_numpy(owners).to(self._device)),
            labels=torch.from_numpy(labels).to(self._device),
            weights=torch.from_numpy(weights).to(self._device),
        )

    def _turns(self, conversation: Conversation) -> list[tuple[tuple[int, ...], float]]:
        """Tokens of every turn, and the weight of its answer."""
        return [
            (self._tokens(question.text, question.answer, turn > 0), _READ_WEIGHT if question.kind == "read" else 1.0)
            for turn, question in enumerate(conversation)
        ]

    def _encode(self, text: str, answer: str, later: bool) -> tuple[int, ...]:
        """Tokens of a question and of its one-token answer; a later turn starts with the end of the last."""
        encode, ended = self._tokenizer, [EOS_ID] if later else []
        asked = (
            ended + encode((_LATER if later else _AFTER_PICTURE).format(text), add_special_tokens=False)["input_ids"]
        )
        answered = encode(_ANSWER.format(answer), add_special_tokens=False)["input_ids"]
        if len(answered) != 1:
            raise ValueError(f"The answer {answer!r} must be one token of the tokenizer, but is {len(answered)}.")
        return (*asked, *answered)

    def _mask(self, owners: Tensor) -> Tensor:
        """Causal attention, in which a conversation (B, L) sees the prefix, the image and itself."""
        total = self._before + owners.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=owners.device).tril()
        seen = causal.expand(len(owners), -1, -1).clone()
        seen[:, self._before :, self._before :] &= owners[:, :, None] == owners[:, None, :]
        mask = torch.zeros(len(owners), 1, total, total, dtype=torch.bfloat16, device=owners.device)
        return mask.masked_fill_(~seen[:, None], _HIDDEN)


__all__ = ["Conversation", "Packed", "Packer"]
