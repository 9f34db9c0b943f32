"""Compression for callers that go around `forward` and call the model without its head, as TRL's trainers do.

They pair its hidden states with labels, masks and positions of the uncut sequence. The inner model therefore reads
the shortened sequence, and gives its hidden states back at the places of the uncut one: a slot that was cut has the
state of the last kept slot before it, so that the token behind an image is predicted from the image's last token.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from .checks import NO_QUESTION
from .compat import CACHE
from .front import QuestionIds

logger = logging.get_logger(__name__)

ASKING_TAG = "reccomp_hf"
"""A tag that a trainer gives the model if it passes questions on to it."""

_MIXIN = (
    "TRL's GRPOTrainer and RLOOTrainer lose it between sampling and scoring: put the mixin in front, class MyTrainer("
    "reccomp_hf.CompressedTrainerMixin, GRPOTrainer)."
)
_TRAINERS = f"{_MIXIN} For other callers the processor of this checkpoint writes it (AutoProcessor.from_pretrained)."
_REFERENCE = (
    "TRL's GRPOTrainer and RLOOTrainer with a reference (beta above 0) end in a TypeError about recovery_input_ids: "
    "the processor returns it even if the choice of tokens reads no question. Put the mixin in front, class MyTrainer("
    "reccomp_hf.CompressedTrainerMixin, GRPOTrainer), or leave beta at 0."
)
_stock: contextvars.ContextVar[bool] = contextvars.ContextVar("reccomp_stock", default=False)
_sources: Any = WeakTensorKeyDictionary()  # embeddings of a shortened sequence -> where its slots come from


@contextlib.contextmanager
def stock_inner_model() -> Iterator[None]:
    """Let the inner model read every token: a call with `enabled: false` goes through it."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


class InnerModelMixin:
    """Compresses calls of the inner model that contain images."""

    _modules: dict[str, Any]
    _section: Any
    _reads_question: Any
    _compress: Any
    model: Any
    token_recovery: Any

    def _watch_inner_model(self) -> None:
        """Compress the inner model's own calls from now on."""
        self.model.register_forward_pre_hook(self._shorten_call, with_kwargs=True)
        self.model.register_forward_hook(self._lengthen_output, with_kwargs=True)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As the stock method, which TRL's trainers call when they are built; refuses the ones that lose the question.

        It warns of others that cannot score by a reference.

        Raises:
            ValueError: `grpo` or `rloo` without the mixin, while the choice of tokens reads the question.
        """
        given = {tags} if isinstance(tags, str) else {*tags}
        section = self._section(None)
        if given & {"grpo", "rloo"} and ASKING_TAG not in given:
            if section.enabled and self._reads_question(section):
                raise ValueError(f"{NO_QUESTION} {_MIXIN}")
            if self.token_recovery is not None:
                logger.warning(_REFERENCE)
        super().add_model_tags(tags)  # type: ignore[misc]

    def _shorten_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Arguments of the shortened sequence; `None` to leave a call as it is."""
        if len(args) < 2 and kwargs.get("pixel_values") is None:
            return None
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "pixel_values" not in inputs or _stock.get() or not (section := self._section(None)).enabled:
            return None
        question = QuestionIds(*(inputs.pop(f"recovery_{name}", None) for name in QuestionIds._fields))
        if question.input_ids is None and question.words is None and self._reads_question(section):
            raise ValueError(f"{NO_QUESTION} {_TRAINERS}")
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        compressed = self._compress(inputs, question, section, keeps_last_columns=False)
        shortened = {name: value for name, value in compressed.inputs.items() if name != "input_ids"}
        _sources[shortened["inputs_embeds"]] = slots_before(compressed.source, length), compressed.image_features
        return (), shortened

    def _lengthen_output(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output at the places of the uncut sequence; without a cache, which has other places."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds not in _sources:
            return None
        before, features = _sources.pop(embeds)

        def lengthened(states: Tensor) -> Tensor:
            index = before.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1])
            return states.gather(1, index)

        if isinstance(output, tuple):
            return (lengthened(output[0]), *output[1:])
        output.last_hidden_state = lengthened(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(map(lengthened, output.hidden_states))
        if output.get(CACHE) is not None:
            output[CACHE] = None
        if "image_hidden_states" in inspect.signature(type(output)).parameters:
            output.image_hidden_states = features
        return output


def slots_before(source: Tensor, length: int) -> Tensor:
    """The new slot that holds each uncut slot, or the last kept one before it.

    Args:
        source: (R, W) int64, the uncut slot that each new slot holds, -1 for padding.
        length: Number of uncut slots L.

    Returns:
        (R, L) int64; the row's first kept slot where none stands before.
    """
    rows, width = source.shape
    slots = torch.arange(width, device=source.device).expand(rows, -1)
    found = source.new_full((rows, length + 1), -1).scatter_(1, torch.where(source < 0, length, source), slots)
    found = found[:, :length]
    first = torch.where(source < 0, width, slots).amin(-1, keepdim=True).clamp(max=width - 1)
    return torch.where(found < 0, -1, found).cummax(-1).values.maximum(first)


__all__ = ["InnerModelMixin", "slots_before", "stock_inner_model"]
