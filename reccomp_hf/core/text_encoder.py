"""CLIP's text side inside a LLaVA."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from .checks import check_supported
from .compat import key_options, rename_vision_key
from .questions import LARGEST_IS_END, LENGTH_STEP, lengthened
from .tensor_checks import check_known_ids
from .tensors import round_up

_SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")  # TorchAO's and most others', bitsandbytes'


class TokenRecoveryModules(nn.Module):
    """CLIP's text encoder and visual projection, frozen, which relate a question to a patch.

    `named_modules` stops here: adapters and quantisers find their targets by module name, and must not find these
    weights (`target_modules="q_proj"` or `"all-linear"` would otherwise reach the text encoder).
    """

    def __init__(self, text_config: CLIPTextConfig, vision_width: int) -> None:
        """Build both modules from a CLIP text config; the projection maps `vision_width` to its projection width."""
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(text_config)
        self.visual_projection = nn.Linear(vision_width, text_config.projection_dim, bias=False)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module alone."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self

    def distinct_texts(
        self, input_ids: Tensor, pooling: str = "end", *, rounded: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Every text of some questions once, no longer than to the last end of text: all that needs to be read.

        The text encoder is causal and pools at the first end of text: what follows does not change an embedding.

        Args:
            input_ids: (rows, windows, length) int64, on the host.
            pooling: See `embed_question`; with `"last"` texts keep their padding.
            rounded: Whether to round the length up to a multiple of 8 and the number of texts to a power of 2, but not
                above those of the input: few shapes mean few CUDA graphs.

        Returns:
            (texts, length) ids, and (rows, windows) int64, the text of each window.

        Raises:
            ValueError: Ids that the text encoder does not have.
        """
        flat, inverse = input_ids.flatten(0, 1).unique(dim=0, return_inverse=True)
        check_known_ids("recovery_input_ids", flat, self.text_encoder.config.vocab_size)
        if rounded:
            texts = min(1 << (len(flat) - 1).bit_length(), len(inverse))
            flat = torch.cat([flat, flat[:1].expand(texts - len(flat), -1)])
        if pooling == "end":
            length = self._read_length(flat)
            flat = flat[:, : round_up(length, LENGTH_STEP) if rounded else length]
        return flat, inverse.view(input_ids.shape[:2])

    def embed_question(self, input_ids: Tensor, pooling: str = "end") -> Tensor:
        """Embeddings of questions in CLIP's joint space; padding after the end-of-text token needs no mask.

        Args:
            input_ids: (rows, windows, length) int64, as long as the longest question needs.
            pooling: `"end"`: at the end-of-text token, as CLIP was trained; `"last"`: at the encoder's last position,
                to which the last id is repeated; it holds padding unless a window is full.

        Returns:
            (rows, windows, P).
        """
        if pooling == "last":
            input_ids = lengthened(input_ids, self.text_encoder.config.max_position_embeddings)
        outputs = self.text_encoder(input_ids=input_ids.flatten(0, 1))
        embeds = outputs.text_embeds
        if pooling == "last":
            embeds = self.text_encoder.text_projection(outputs.last_hidden_state[:, -1])
        return embeds.unflatten(0, input_ids.shape[:2])

    def _read_length(self, input_ids: Tensor) -> int:
        """Tokens up to the last end of text, where CLIP pools: the first one of every row, of ids (texts, length)."""
        end = self.text_encoder.config.eos_token_id
        is_end = input_ids == (input_ids.amax(-1, keepdim=True) if end == LARGEST_IS_END else end)
        return len(is_end.int().argmax(-1).bincount())


class RecoveryModulesMixin:
    """Adds the recovery modules to a stock LLaVA class: builds, loads, counts, and keeps them frozen."""

    # Attributes of the stock class.
    config: Any
    model: Any
    post_init: Any
    _modules: dict[str, Any]
    token_recovery: TokenRecoveryModules | None

    def __init__(self, config: Any) -> None:
        """Build the stock model, then the recovery modules if the config names a text encoder.

        Raises:
            ValueError: A vision tower or feature selection without a class token.
        """
        check_supported(config, config.token_recovery)
        super().__init__(config)  # type: ignore[call-arg]
        self.token_recovery = _build_recovery_modules(config)
        self.post_init()
        self._freeze()

    @property
    def _llava(self) -> Any:
        """The stock module that holds vision tower, projector and language model."""
        return self if "vision_tower" in self._modules else self.model

    def _freeze(self) -> None:
        """The choice of tokens has no gradient: the vision tower is trained on request, CLIP's text side never."""
        self._llava.vision_tower.requires_grad_(False)
        self._freeze_text_side()

    def _freeze_text_side(self) -> None:
        for _, module in self._text_side(""):
            module.requires_grad_(False)

    def _text_side(self, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules that `named_modules` does not show, with their paths."""
        for name, module in [] if self.token_recovery is None else self.token_recovery.named_children():
            yield ".".join(filter(None, (prefix, "token_recovery", name))), module

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As the stock method for all parameters except CLIP's text side, which stays frozen."""
        super().requires_grad_(requires_grad)  # type: ignore[misc]
        self._freeze_text_side()
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the stock method; the keys of weights that TorchAO quantised fit the metadata of their files."""
        super().save_pretrained(save_directory, *args, **(key_options(self) | kwargs))  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the stock method, but weights that are missing from the checkpoint raise instead of being random.

        A `quantization_config` never reaches CLIP's text side.

        Raises:
            ValueError: The checkpoint lacks weights that the config asks for.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_text_side(kwargs["quantization_config"])
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of {cls.__name__}, which would be random: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. A stock LLaVA becomes a checkpoint "
                "of this class by reccomp_hf.convert(llava, clip, output)."
            )
        model._freeze()  # 5.x makes new parameters while it loads
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the config's `save_pretrained` writes the code and its `auto_map`."""

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """On 4.57, read vision towers that transformers 5.x wrote."""
        renamed = rename_vision_key(key)
        return renamed, renamed != key

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, including the frozen recovery modules'."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        for path, module in self._text_side(prefix) if recurse else ():
            yield from module.named_parameters(path, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """All buffers, including the frozen recovery modules'."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        for path, module in self._text_side(prefix) if recurse else ():
            yield from module.named_buffers(path, recurse, remove_duplicate)


def _sparing_text_side(quantization_config: Any) -> Any:
    """A quantisation config that also skips the recovery modules, which some quantisers find by their weights' names.

    A list that is `None` means the modules that transformers skips by default, the output embeddings.
    """
    if isinstance(quantization_config, dict):
        from transformers.quantizers import AutoQuantizationConfig  # imports TorchAO, which prints a lot

        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    sparing = copy.copy(quantization_config)
    for name in _SKIP_LISTS:
        if hasattr(sparing, name):
            given = getattr(sparing, name)
            setattr(sparing, name, [*(["lm_head"] if given is None else given), "token_recovery"])
    return sparing


def _build_recovery_modules(config: Any) -> TokenRecoveryModules | None:
    """The modules that a model config asks for; `None` for a visual-only model."""
    section = config.token_recovery.text_encoder_config
    if section is None:
        return None
    return TokenRecoveryModules(CLIPTextConfig(**section), config.vision_config.hidden_size)


__all__ = ["RecoveryModulesMixin", "TokenRecoveryModules"]
