"""What a conversion is made of, and all that configs and headers tell about it before a weight is read."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.utils.logging import is_progress_bar_enabled

from ...core.checks import check_supported
from ...core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from ...core.methods.registry import get_method
from ...core.modeling_llava import LlavaRecCompForConditionalGeneration
from ...core.modeling_llava_next import LlavaNextRecCompForConditionalGeneration
from ...core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .. import hub
from ..completeness import missing_shards
from . import shards
from .checks import check_clip, check_keys, check_text_side, guess_clip, text_encoder_config
from .shards import DTYPES, Headers


class Family(NamedTuple):
    """The classes of a kind of LLaVA: transformers' own model, and ours."""

    stock_class: Any
    config_class: Any
    model_class: Any
    processor_class: Any


FAMILIES: dict[str, Family] = {
    "llava": Family(
        LlavaForConditionalGeneration,
        LlavaRecCompConfig,
        LlavaRecCompForConditionalGeneration,
        LlavaRecCompProcessor,
    ),
    "llava_next": Family(
        LlavaNextForConditionalGeneration,
        LlavaNextRecCompConfig,
        LlavaNextRecCompForConditionalGeneration,
        LlavaNextRecCompProcessor,
    ),
}
"""By the stock model type."""
_OF_THE_SOURCE = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")


class Source(NamedTuple):
    """A checkpoint to convert.

    Attributes:
        name: What the user calls it: a folder, a Hub id, `org/name@revision`.
        folder: Where its config and tokenizers are, and its weights once they are [`downloaded`].
        config: Its config.
        headers: Its weights by place, `None` where they are no safetensors or not known yet.
        hub_id: Its Hub id without the revision, `None` for a folder.
    """

    name: str
    folder: Path
    config: Any
    headers: Headers | None
    hub_id: str | None

    @property
    def known_headers(self) -> Headers:
        """The headers of a source that has been fetched."""
        return self.headers or {}

    def downloaded(self) -> Source:
        """The source with its weights on this disk, and their headers if they are safetensors."""
        folder = hub.resolve(self.name, progress=is_progress_bar_enabled())
        headers = shards.read_headers(folder) if shards.has_safetensors(folder) else None
        return self._replace(folder=folder, headers=headers)

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of the weights that a new checkpoint takes from it, cast if a dtype is named."""
        starts = tuple(shards.TEXT_SIDE) if self.config.model_type == "clip" else ""
        taken = [header for place, header in self.known_headers.items() if place.startswith(starts)]
        return sum(header.nbytes(dtype) for header in taken)


class Plan(NamedTuple):
    """A conversion whose configs, and headers as far as they are known, fit.

    Attributes:
        family: The classes of this kind of LLaVA.
        llava: The LLaVA.
        clip: The CLIP, `None` for a visual-only model.
        guessed: Whether the CLIP was guessed from the vision tower's sizes.
        config: The config of the new checkpoint.
        dtype: What the weights are cast to, `None` if they stay.
    """

    family: Family
    llava: Source
    clip: Source | None
    guessed: bool
    config: Any
    dtype: str | None

    @property
    def hub_ids(self) -> list[str]:
        """The Hub ids of the sources that come from there."""
        sources = (self.llava, self.clip)
        return [source.hub_id for source in sources if source is not None and source.hub_id is not None]


def plan_conversion(
    llava: str | os.PathLike[str],
    clip: str | os.PathLike[str] | None,
    section: TokenRecoveryConfig,
    *,
    dtype: str | None = None,
) -> Plan:
    """Check everything that configs and headers tell; no weights are downloaded or read.

    Args:
        llava: Folder or Hub id of a stock LLaVA.
        clip: Folder or Hub id of the CLIP, `"auto"` to guess it, `None` for a visual-only model.
        section: The new checkpoint's settings; the text encoder's config is put in here.
        dtype: What to cast the weights to.

    Raises:
        ValueError: Something does not fit.
        OSError: A source cannot be had.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))} or None, got {dtype!r}.")
    source = read_source(llava, "llava")
    family, vision = FAMILIES[source.config.model_type], source.config.vision_config
    if clip is None and get_method(section.method).text == "required":
        raise ValueError(f"Method {section.method!r} needs the question, and so a CLIP: clip is None.")
    clip_source, guessed = None, clip == "auto"
    if clip is not None:
        clip_source = read_source(guess_clip(vision) if guessed else clip, "clip")
        check_clip(vision, clip_source.config)
        section = section.replace({"text_encoder_config": text_encoder_config(clip_source.config)})
    check_supported(source.config, section)
    if source.headers is not None:
        check_keys(source.headers, family.stock_class, source.config, source.name)
    if clip_source is not None and clip_source.headers is not None:
        check_text_side(clip_source.headers, clip_source.name)
    config = _config(family, source.config, section, dtype)
    return Plan(family, source, clip_source, guessed, config, dtype)


def read_source(name: str | os.PathLike[str], argument: str) -> Source:
    """Config and headers of a source; of a Hub repository's weights only headers are downloaded.

    Raises:
        ValueError: It is of another kind, quantised, or its files are broken.
        OSError: It cannot be had.
    """
    name = os.fspath(name)
    here = Path(name).expanduser().is_dir()
    folder = hub.resolve(name, weights=False, progress=is_progress_bar_enabled())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_model_type(config, argument)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantised: convert the plain model, and quantise what comes out.")
    headers = None
    if shards.has_safetensors(folder) and (here or not missing_shards(folder)):
        headers = shards.read_headers(folder)
    elif not here and not constants.HF_HUB_OFFLINE:
        headers = shards.read_hub_headers(name)
    return Source(name, folder, config, headers, None if here else hub.split_revision(name)[0])


def check_model_type(config: Any, argument: str) -> None:
    """Refuse a source of another kind.

    Raises:
        ValueError: It is.
    """
    known: Collection[str] = FAMILIES if argument == "llava" else ("clip",)
    if config.model_type not in known:
        raise ValueError(
            f"{argument} must be of model_type {' or '.join(map(repr, known))}, got {config.model_type!r}."
        )


def _config(family: Family, stock: Any, section: TokenRecoveryConfig, dtype: str | None) -> Any:
    """The config of the new checkpoint."""
    fields = {name: value for name, value in stock.to_dict().items() if name not in _OF_THE_SOURCE}
    config = family.config_class(token_recovery=section, **fields)
    wanted = config.dtype if dtype is None else DTYPES[dtype]
    if wanted is not None:
        # Where a part's dtype is not the whole's, transformers 4.57 loads it so, whatever its weights are.
        for part in (config, config.text_config, config.vision_config):
            part.dtype = wanted
    return config


__all__ = ["FAMILIES", "Family", "Plan", "Source", "check_model_type", "plan_conversion", "read_source"]
