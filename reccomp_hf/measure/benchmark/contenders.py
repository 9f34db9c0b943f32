"""The contenders: the stock model, ours, and the oracle, which gets the short prompt's embeddings for free."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.compat import CACHE
from ...core.graphs import GraphCache
from .batches import Inputs
from .timing import Measures, Stopwatch

STOCK, OURS, ORACLE = "stock", "ours", "oracle"


@dataclasses.dataclass
class Contender:
    """One way from images and prompts to an answer.

    Args:
        model: The model that all contenders share.
        read: Runs this contender up to the first token's logits, and returns the model's output with its cache.
        attention_mask: (R, L) of the prompt as the language model reads it.
        next_position: (R,) int64, position of the first new token.
        visual_tokens: (R,) int64, visual tokens of each prompt, newlines included.
        graphs: The CUDA graphs that a prefill is replayed by; `None` runs it eagerly.
    """

    model: Any
    read: Callable[[], Any]
    attention_mask: Tensor
    next_position: Tensor
    visual_tokens: Tensor
    graphs: GraphCache | None = None

    @torch.no_grad()
    def prefill(self) -> Any:
        """Everything up to the first token's logits."""
        with recordings(self.model, self.graphs):
            return self.read()

    @torch.no_grad()
    def decode(self, prefilled: Any, steps: int) -> Tensor:
        """Decode `steps` further tokens greedily, past an end-of-text token too: (R, steps) ids."""
        rows, length = self.attention_mask.shape
        mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(rows, steps)], dim=1)
        logits, cache, chosen = prefilled.logits, getattr(prefilled, CACHE), []
        for step in range(steps):
            chosen.append(logits[:, -1:].argmax(-1))
            output = self.model(
                input_ids=chosen[-1],
                attention_mask=mask[:, : length + step + 1],
                position_ids=(self.next_position + step).unsqueeze(-1),
                cache=cache,
                use_cache=True,
            )
            logits, cache = output.logits, getattr(output, CACHE)
        return torch.cat(chosen, dim=1)

    def turn(self, stopwatch: Stopwatch, steps: int) -> Measures:
        """Prefill and decode once.

        Returns:
            `"prefill"`, `"decode"` (of one token) and `"answer"` (both together), in seconds.
        """
        prefill, prefilled = stopwatch.time(self.prefill)
        decode, _ = stopwatch.time(lambda: self.decode(prefilled, steps))
        return {"prefill": prefill, "decode": decode / steps, "answer": prefill + decode}


@contextlib.contextmanager
def recordings(model: Any, graphs: GraphCache | None) -> Iterator[None]:
    """The model uses these CUDA graphs, or none, in the context; those it had are kept for later."""
    before = model._graphs
    model._graphs = graphs
    try:
        yield
    finally:
        model._graphs = before


def stock(model: Any, inputs: Inputs) -> Contender:
    """The model with token recovery off, which equals the stock one bit for bit."""
    off = {"enabled": False}
    return Contender(
        model,
        lambda: model(**inputs, token_recovery=off, logits_to_keep=1, use_cache=True),
        attention_mask=inputs["attention_mask"],
        next_position=inputs["attention_mask"].sum(-1),
        visual_tokens=(inputs["input_ids"] == model.config.image_token_id).sum(-1),
    )


def ours(model: Any, inputs: Inputs, fields: dict[str, Any], graphs: GraphCache | None = None) -> Contender:
    """The compressed model with fields of its section overridden."""
    prompt = _short_prompt(model, inputs, fields)
    return Contender(
        model,
        lambda: model(**inputs, token_recovery=fields, logits_to_keep=1, use_cache=True),
        *_prompt(model, prompt),
        graphs,
    )


def oracle(model: Any, inputs: Inputs, fields: dict[str, Any], graphs: GraphCache | None = None) -> Contender:
    """The limit: the full vision tower, as in the stock model, and the short prompt's embeddings for free.

    The language model reads exactly the prompt of `ours`; nothing is chosen, merged, projected or cut.
    """
    prompt = _short_prompt(model, inputs, fields)
    embedded = {name: prompt[name] for name in ("inputs_embeds", "attention_mask", "position_ids") if name in prompt}
    pixels = inputs["pixel_values"]
    pixels = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels  # tiles; all images of a batch have equally many

    tower = model.model.vision_tower

    def states(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = tower(tensors["pixel_values"], output_hidden_states=True)
        return {"states": found.hidden_states[model.config.vision_feature_layer]}

    def read() -> Any:
        given = {"pixel_values": pixels}
        if graphs is None or graphs.run("oracle's vision tower", [tower], (), states, given) is None:
            states(given)
        return model(**embedded, logits_to_keep=1, use_cache=True)

    return Contender(model, read, *_prompt(model, prompt), graphs)


@torch.no_grad()
def _short_prompt(model: Any, inputs: Inputs, fields: dict[str, Any]) -> dict[str, Any]:
    return model.compress_inputs(**inputs, token_recovery=fields)[0]


def _prompt(model: Any, prompt: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, next positions and visual tokens of a shortened prompt."""
    mask, positions = prompt["attention_mask"], prompt.get("position_ids")
    following = mask.sum(-1) if positions is None else positions.amax(-1) + 1
    return mask, following, (prompt["input_ids"] == model.config.image_token_id).sum(-1)


__all__ = ["ORACLE", "OURS", "STOCK", "Contender", "oracle", "ours", "stock"]
