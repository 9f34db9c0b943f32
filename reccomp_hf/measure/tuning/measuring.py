"""How far settings move a model's answers from those of the uncompressed model: one forward pass for each setting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.prompts import count_visual_tokens
from ..evaluation.samples import Sample, encode_samples, with_encoded_images

_DIGITS = 9  # of a divergence, behind the point


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A setting's answer to a question, compared with the uncompressed model's.

    Attributes:
        divergence: Mean Jensen-Shannon divergence of the next-token distributions along the uncompressed model's
            answer, in bits: from 0 for equal ones to 1.
        agrees: Whether greedy decoding gives the uncompressed model's answer, token by token.
        tokens: Visual tokens that the language model read, LLaVA-NeXT's newlines included.
    """

    divergence: float
    agrees: bool
    tokens: int


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions in bits, computed in float32 (Lin, 1991).

    Args:
        first: (..., V) logits.
        second: (..., V) logits.

    Returns:
        (...,) float32, from 0 for equal distributions to 1 for those that share no token; NaN where logits are.
    """
    logs = [torch.log_softmax(logits.float(), -1) for logits in (first, second)]
    mean = torch.logaddexp(*logs) - math.log(2)
    parts = [torch.where(log == -math.inf, 0.0, log.exp() * (log - mean)).sum(-1) for log in logs]
    return (sum(parts) / (2 * math.log(2))).clamp(0, 1)  # type: ignore[union-attr]


@torch.no_grad()
def measure(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: Mapping[str, Mapping[str, Any]],
    max_new_tokens: int,
    instruction: str = "",
) -> dict[str, list[Measurement]]:
    """Compare settings on a batch of questions.

    The vision tower runs once, and once more inside the uncompressed model, which answers once. Every setting then
    reads prompt and answer in one forward pass, without decoding.

    Args:
        model: A compressed LLaVA in eval mode.
        processor: The model's processor.
        samples: The questions; answers are not read.
        settings: Fields of `token_recovery` to override, by name.
        max_new_tokens: Longest answer in tokens.
        instruction: Text below each question in the prompt, which CLIP does not read.

    Returns:
        A measurement for each question, by the name of the setting.

    Raises:
        ValueError: The logits are NaN or infinite.
    """
    inputs = encode_samples(processor, samples, instruction).to(model.device, model.dtype)
    reference = _Reference.of(model, inputs, max_new_tokens)
    read = read_along(model, inputs, reference.answers, reference.counted, settings)
    return {name: reference.compare(logits, counts) for name, logits, counts in read}


@torch.no_grad()
def read_along(
    model: Any,
    inputs: Mapping[str, Tensor],
    answers: Tensor,
    counted: Tensor,
    settings: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Tensor, list[int]]]:
    """Read prompts and answers under several settings, one forward pass each; the vision tower runs once for all.

    Args:
        model: A compressed LLaVA in eval mode.
        inputs: R prompts of one image each, as `encode_samples` returns them.
        answers: (R, T) int64, the answers' tokens.
        counted: (R, T) bool, the tokens that belong to an answer; the others are masked.
        settings: Fields of `token_recovery` to override, by name; with `enabled: false` the stock model reads them.

    Yields:
        A setting's name, the logits (R, T, V) from which each token of the answers is predicted, and each row's number
        of visual tokens, LLaVA-NeXT's newlines included.
    """
    mask = inputs["attention_mask"]
    appended = {"input_ids": answers, "attention_mask": counted.to(mask.dtype)}
    texts = {name: torch.cat([inputs[name], part[:, :-1]], 1) for name, part in appended.items()}
    sections = [dict(fields) for fields in settings.values() if fields.get("enabled", True)]
    whole = {**inputs, **texts}
    short = {**with_encoded_images(model, dict(inputs), sections), **texts} if sections else {}
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist()
    for name, fields in settings.items():
        given = short if fields.get("enabled", True) else whole
        output = model(**given, token_recovery=dict(fields), logits_to_keep=answers.shape[1], use_cache=False)
        yield name, output.logits, count_visual_tokens(output, [1] * len(placeholders), placeholders)


@dataclasses.dataclass
class _Reference:
    """The uncompressed model's answers.

    Args:
        answers: (R, T) int64, its tokens.
        logits: (R, T, V), the logits from which each of them was taken.
        counted: (R, T) bool, the tokens up to the end of the answer.
    """

    answers: Tensor
    logits: Tensor
    counted: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Tensor], max_new_tokens: int) -> _Reference:
        output = model.generate(
            **inputs,
            token_recovery={"enabled": False},
            do_sample=False,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        end = model.generation_config.eos_token_id
        ends = torch.isin(answers, torch.tensor([] if end is None else end, device=answers.device).long())
        counted = (ends.cumsum(-1) - ends.long()) == 0
        return cls(answers, torch.stack(output.logits, 1), counted)

    def compare(self, logits: Tensor, counts: Sequence[int]) -> list[Measurement]:
        """Measurements of the rows, given a setting's logits (R, T, V) and its visual tokens."""
        divergences = jensen_shannon(self.logits, logits).masked_fill(~self.counted, 0.0)
        equal = (self.logits.argmax(-1) == logits.argmax(-1)) | ~self.counted
        columns = (divergences.sum(-1) / self.counted.sum(-1)).tolist(), equal.all(-1).tolist(), counts
        if any(map(math.isnan, columns[0])):
            raise ValueError(
                "The model's logits are NaN or infinite, so that answers cannot be compared: check its weights, or "
                "load it in another --dtype; float16 overflows where bfloat16 does not."
            )
        # The last bits of a sum depend on where its numbers lie in memory; without them two runs give equal files.
        return [Measurement(round(value, _DIGITS), *row) for value, *row in zip(*columns, strict=True)]


__all__ = ["Measurement", "jensen_shannon", "measure", "read_along"]
