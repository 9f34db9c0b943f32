"""The plan of a conversion: its sources, checked by configs and headers before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.utils.logging import is_progress_bar_enabled

from ...core.checks import check_supported
from ...core.configuration import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from ...core.methods.registry import get_method
from ...core.modeling_llava import LlavaRecCompForConditionalGeneration
from ...core.modeling_llava_next import LlavaNextRecCompForConditionalGeneration
from ...core.processing import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .. import hub
from ..processors import check_generation_config, load_config
from ..weight_files import WeightFiles
from . import shards
from .compatibility import check_clip, check_keys, check_text_side, guess_clip, text_encoder_config
from .shards import DTYPES, Headers


class Family(NamedTuple):
    """The classes of a kind of LLaVA: transformers' model, and ours."""

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
"""Stock model type -> classes."""
_SOURCE_FIELDS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")


class Source(NamedTuple):
    """A checkpoint to convert.

    Attributes:
        name: Name as the user gave it: a folder, a Hub id, `org/name@revision`.
        folder: Folder with the config and the tokenizers, and with the weights once they are [`downloaded`].
        config: Config of the source.
        headers: Weights by place; `None` if they are not safetensors or not known yet.
        hub_id: Hub id without the revision; `None` for a folder.
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
        headers = shards.read_headers(folder) if WeightFiles.find(folder).safetensors else None
        return self._replace(folder=folder, headers=headers)

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of the weights that a new checkpoint takes from the source, after a cast if a dtype is given."""
        starts = tuple(shards.TEXT_SIDE) if self.config.model_type == "clip" else ""
        taken = [header for place, header in self.known_headers.items() if place.startswith(starts)]
        return sum(header.nbytes(dtype) for header in taken)


class Plan(NamedTuple):
    """A conversion whose configs, and headers if they are known, fit.

    Attributes:
        family: The classes of this kind of LLaVA.
        llava: The LLaVA.
        clip: The CLIP; `None` for a visual-only model.
        guessed: Whether the CLIP was guessed from the vision tower's sizes.
        config: The config of the new checkpoint.
        dtype: Dtype that the weights are cast to; `None` if they are not.
    """

    family: Family
    llava: Source
    clip: Source | None
    guessed: bool
    config: Any
    dtype: str | None

    @property
    def hub_ids(self) -> list[str]:
        """Hub ids of the sources that come from the Hub."""
        sources = (self.llava, self.clip)
        return [source.hub_id for source in sources if source is not None and source.hub_id is not None]


def plan_conversion(
    llava: str | os.PathLike[str],
    clip: str | os.PathLike[str] | None,
    section: TokenRecoveryConfig,
    *,
    dtype: str | None = None,
) -> Plan:
    """Check configs and headers of the sources; no weights are downloaded or read.

    Args:
        llava: Folder or Hub id of a stock LLaVA.
        clip: Folder or Hub id of the CLIP, `"auto"` to guess it, `None` for a visual-only model.
        section: Settings of the new checkpoint; the text encoder's config is added here.
        dtype: Dtype to cast the weights to; `None` to keep theirs.

    Raises:
        ValueError: The sources, the settings or the dtype do not fit.
        OSError: A source is missing or cannot be downloaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))} or None, got {dtype!r}.")
    source = read_source(llava, "llava")
    family, vision = FAMILIES[source.config.model_type], source.config.vision_config
    if clip is None and get_method(section.method).text == "required":
        raise ValueError(f"Method {section.method!r} needs the question, and so a CLIP, but clip is None.")
    clip_source, guessed = None, clip == "auto"
    if clip is not None:
        clip_source = read_source(guess_clip(vision) if guessed else clip, "clip")
        check_clip(vision, clip_source.config)
        section = section.replace({"text_encoder_config": text_encoder_config(clip_source.config)})
    check_supported(source.config, section.replace({"enabled": True}))  # it may be switched on later
    if source.headers is not None:
        check_keys(source.headers, family.stock_class, source.config, source.name)
    if clip_source is not None and clip_source.headers is not None:
        check_text_side(clip_source.headers, clip_source.name)
    config = _config(family, source.config, section, dtype)
    return Plan(family, source, clip_source, guessed, config, dtype)


def read_source(name: str | os.PathLike[str], argument: str) -> Source:
    """Config and headers of a source; of a repository's weights only the headers are downloaded.

    Raises:
        ValueError: The source is of another kind or quantised, or its files are damaged.
        OSError: The source is missing or cannot be downloaded.
    """
    name = os.fspath(name)
    local = Path(name).expanduser().is_dir()
    folder = hub.resolve(name, weights=False, progress=is_progress_bar_enabled())
    config = load_config(folder)
    check_generation_config(folder)
    check_model_type(config, argument)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantised: convert the plain model, and quantise the result.")
    headers, files = None, WeightFiles.find(folder)
    if files.safetensors and (local or not files.missing):
        headers = shards.read_headers(folder)
    elif not local and not constants.HF_HUB_OFFLINE:
        headers = shards.read_hub_headers(name)
    return Source(name, folder, config, headers, None if local else hub.split_revision(name)[0])


def check_model_type(config: Any, argument: str) -> None:
    """Check that a source is a LLaVA, or a CLIP.

    Raises:
        ValueError: It is of another model type.
    """
    known: Collection[str] = FAMILIES if argument == "llava" else ("clip",)
    if config.model_type not in known:
        raise ValueError(
            f"{argument} must be of model_type {' or '.join(map(repr, known))}, got {config.model_type!r}."
        )


def _config(family: Family, stock: Any, section: TokenRecoveryConfig, dtype: str | None) -> Any:
    """The config of the new checkpoint."""
    fields = {name: value for name, value in stock.to_dict().items() if name not in _SOURCE_FIELDS}
    config = family.config_class(token_recovery=section, **fields)
    wanted = config.dtype if dtype is None else DTYPES[dtype]
    if wanted is not None:
        # Transformers 4.57 loads a part in the dtype of its own config, whatever the dtype of its weights.
        for part in (config, config.text_config, config.vision_config):
            part.dtype = wanted
    return config


__all__ = ["FAMILIES", "Family", "Plan", "Source", "check_model_type", "plan_conversion", "read_source"]
