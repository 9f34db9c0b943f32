"""The operators behind the cost model: how much every part of a compressed LLaVA computes and moves.

Counts are numbers of operations and of elements; bytes and seconds follow from a dtype and an accelerator.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CLIPTextConfig

from ...core.counting import patches_per_side
from .hardware import Hardware, get_width


@dataclasses.dataclass(frozen=True)
class Operator:
    """One computation that loads its inputs from memory and stores its result there.

    Args:
        name: What it is.
        operations: Floating-point operations; a multiplication and an addition are two.
        weights: Weight elements it reads.
        reads: Activation elements it reads.
        writes: Activation elements it stores.
        cache: Elements of the key-value cache that it reads or stores.
        repeats: How often it runs, once per layer say.
    """

    name: str
    operations: float
    weights: float = 0
    reads: float = 0
    writes: float = 0
    cache: float = 0
    repeats: int = 1

    def moved(self, width: float) -> float:
        """Bytes from and to memory in one run, numbers being `width` bytes wide."""
        return (self.weights + self.reads + self.writes + self.cache) * width

    def seconds(self, hardware: Hardware, dtype: str) -> float:
        """Roofline time of one run: computing or moving, whichever takes longer."""
        return max(self.operations / hardware.peak(dtype), self.moved(get_width(dtype)) / hardware.bandwidth)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A lower bound on what operators cost on an accelerator, and what they are.

    Args:
        operators: What runs.
        hardware: Where.
        dtype: In which numbers.
    """

    operators: tuple[Operator, ...]
    hardware: Hardware
    dtype: str

    @property
    def flops(self) -> float:
        """Floating-point operations, whatever the dtype."""
        return sum(operator.operations * operator.repeats for operator in self.operators)

    @property
    def seconds(self) -> float:
        """Sum of the operators' roofline times: no launch, no waiting, perfect kernels."""
        return sum(operator.seconds(self.hardware, self.dtype) * operator.repeats for operator in self.operators)

    @property
    def traffic_bytes(self) -> float:
        """Bytes from and to memory (what the paper's table calls total memory)."""
        return sum(operator.moved(get_width(self.dtype)) * operator.repeats for operator in self.operators)

    @property
    def activation_bytes(self) -> float:
        """Bytes of activations stored, one operator after the other; keys and values are the cache's."""
        return sum(operator.writes * operator.repeats for operator in self.operators) * get_width(self.dtype)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks.

    Args:
        layers: Blocks.
        width: Width of the hidden state.
        inner: Width inside the feed-forward part.
        heads: Attention heads.
        key_heads: Heads of keys and values; fewer under grouped-query attention.
        head_width: Width of a head.
        gated: Whether the feed-forward part has a gate, as Llama's; CLIP's has none.
        cached: Whether keys and values are kept for later tokens.
    """

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    gated: bool
    cached: bool

    @classmethod
    def of(cls, config: Any, gated: bool) -> Stack:
        """Read a config of a language model (gated) or of a CLIP encoder."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            gated=gated,
            cached=gated,
        )

    @property
    def key_width(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.key_heads * self.head_width

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of a block: name -> width in, width out."""
        query = self.heads * self.head_width
        names = ("gate", "up") if self.gated else ("up",)
        return {
            "query": (self.width, query),
            "key": (self.width, self.key_width),
            "value": (self.width, self.key_width),
            "attention out": (query, self.width),
            **dict.fromkeys(names, (self.width, self.inner)),
            "down": (self.inner, self.width),
        }

    def operators(self, new: int, context: int, batch: int) -> list[Operator]:
        """What the blocks do for `batch` rows of `new` tokens that attend to `context` tokens, their own included.

        The accounting is that of LLM-Viewer (Yuan et al., arXiv 2402.16363), which the paper's table is made with.
        Three of its simplifications are kept so that the table comes out: attention scores go through memory (eager
        attention), a residual addition reads one of its inputs, and the feed-forward activation is counted at the
        hidden width instead of the inner one (2 to 3 % of the bytes at 636 tokens).
        """
        rows, query = new * batch, self.heads * self.head_width
        scores, keys = rows * context * self.heads, context * batch * self.key_width
        found = [self._linear(name, rows, *widths) for name, widths in self.linears().items()]
        matmul = 2 * scores * self.head_width
        found += [
            self._attention("scores", matmul, rows * query, scores, keys),
            Operator("softmax", 5 * scores, reads=scores, writes=scores),
            self._attention("weighted values", matmul, scores, rows * query, keys),
        ]
        state = rows * self.width
        found += [Operator("norm", 7 * state, reads=state, writes=state)] * 2
        found += [Operator("residual", state, reads=state, writes=state)] * 2
        found.append(Operator("activation", 2 * state, reads=2 * state, writes=state))
        return [dataclasses.replace(operator, repeats=self.layers) for operator in found]

    def _linear(self, name: str, rows: int, width_in: int, width_out: int) -> Operator:
        result, cached = rows * width_out, self.cached and name in ("key", "value")
        return Operator(
            name,
            2 * rows * width_in * width_out,
            weights=width_in * width_out,
            reads=rows * width_in,
            writes=0 if cached else result,
            cache=result if cached else 0,
        )

    def _attention(self, name: str, operations: float, reads: float, writes: float, keys: float) -> Operator:
        if self.cached:
            return Operator(name, operations, reads=reads, writes=writes, cache=keys)
        return Operator(name, operations, reads=reads + keys, writes=writes)


def linear(name: str, rows: int, width_in: int, width_out: int) -> Operator:
    """A linear layer over `rows` vectors."""
    return Operator(
        name, 2 * rows * width_in * width_out, width_in * width_out, reads=rows * width_in, writes=rows * width_out
    )


def vision_operators(config: Any, tiles: int) -> list[Operator]:
    """CLIP's vision tower on `tiles` images or tiles; all of its blocks run, as in stock LLaVA."""
    vision, patches = config.vision_config, patches_per_side(config) ** 2
    embed = linear("patch embedding", patches * tiles, 3 * vision.patch_size**2, vision.hidden_size)
    return [embed, *Stack.of(vision, gated=False).operators(patches + 1, patches + 1, tiles)]


def projector_operators(config: Any, tokens: int) -> list[Operator]:
    """LLaVA's projector on `tokens` tokens."""
    width = config.text_config.hidden_size
    return [
        linear("projector in", tokens, config.vision_config.hidden_size, width),
        Operator("projector activation", 2 * tokens * width, reads=tokens * width, writes=tokens * width),
        linear("projector out", tokens, width, width),
    ]


def text_operators(encoder: dict[str, Any], windows: int) -> list[Operator]:
    """CLIP's text encoder on `windows` windows of a question, each padded to what it reads at a time."""
    config = CLIPTextConfig(**encoder)
    length = config.max_position_embeddings
    head = linear("text projection", windows, config.hidden_size, config.projection_dim)
    return [*Stack.of(config, gated=False).operators(length, length, windows), head]


__all__ = [
    "Cost",
    "Operator",
    "Stack",
    "linear",
    "projector_operators",
    "text_operators",
    "vision_operators",
]
