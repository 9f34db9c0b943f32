"""CLIP's text side inside a LLaVA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


class TokenRecoveryModules(nn.Module):
    """CLIP's text encoder and visual projection, frozen, which say how a question relates to a patch.

    `named_modules` stops here: adapters and quantisers look for their targets by module name, and these weights are
    none (`target_modules="q_proj"` or `"all-linear"` would otherwise reach the text encoder).
    """

    def __init__(self, text_config: CLIPTextConfig, vision_width: int) -> None:
        """Build both modules from a CLIP text config; the projection maps `vision_width` to its projection width."""
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(text_config)
        self.visual_projection = nn.Linear(vision_width, text_config.projection_dim, bias=False)
        self.requires_grad_(False)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module alone."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that `named_modules` does not show, with their names."""
        yield from self.named_children()

    def embed_question(self, input_ids: Tensor) -> Tensor:
        """Embeddings pooled at the end-of-text token: (rows, windows, length) int64 -> (rows, windows, P).

        The text encoder is causal, so padding after the end-of-text token needs no mask.
        """
        rows, windows, length = input_ids.shape
        embeds = self.text_encoder(input_ids=input_ids.reshape(rows * windows, length)).text_embeds
        return embeds.reshape(rows, windows, -1)


def build_recovery_modules(config: Any) -> TokenRecoveryModules | None:
    """The modules that a model config asks for; `None` for a visual-only model."""
    section = config.token_recovery.text_encoder_config
    if section is None:
        return None
    return TokenRecoveryModules(CLIPTextConfig(**section), config.vision_config.hidden_size)


__all__ = ["TokenRecoveryModules", "build_recovery_modules"]
