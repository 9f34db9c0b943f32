"""From a stock LLaVA and the CLIP that its vision tower came from to a checkpoint of ours. Nothing is trained."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from . import compat
from .configuration_reccomp import LlavaNextRecCompConfig, LlavaRecCompConfig, TokenRecoveryConfig
from .modeling_llava_next_reccomp import LlavaNextRecCompForConditionalGeneration
from .modeling_llava_reccomp import LlavaRecCompForConditionalGeneration
from .processing_reccomp import LlavaNextRecCompProcessor, LlavaRecCompProcessor
from .recovery import get_method

logger = logging.getLogger(__name__)

# Stock model type -> stock model, our config, our model, our processor.
FAMILIES: dict[str, tuple[Any, Any, Any, Any]] = {
    "llava": (
        LlavaForConditionalGeneration,
        LlavaRecCompConfig,
        LlavaRecCompForConditionalGeneration,
        LlavaRecCompProcessor,
    ),
    "llava_next": (
        LlavaNextForConditionalGeneration,
        LlavaNextRecCompConfig,
        LlavaNextRecCompForConditionalGeneration,
        LlavaNextRecCompProcessor,
    ),
}

Source: TypeAlias = str | os.PathLike[str] | PreTrainedModel


def convert(
    llava: Source,
    clip: Source | None,
    output: str | os.PathLike[str],
    preset: str = "paper",
    *,
    processor: Any = None,
    clip_tokenizer: Any = None,
    **overrides: Any,
) -> Path:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load as a compressed LLaVA.

    Args:
        llava: A stock LLaVA-1.5 or LLaVA-NeXT: a folder, a Hub id or the loaded model with its head.
        clip: The CLIP whose vision tower LLaVA uses: a folder, a Hub id or a loaded `CLIPModel`. `None` makes a
            visual-only checkpoint.
        output: Folder to write; it must not exist, or be empty.
        preset: Name of a preset, see [`TokenRecoveryConfig.from_preset`].
        processor: LLaVA's processor; by default it is loaded from where `llava` came from.
        clip_tokenizer: CLIP's tokenizer; by default it is loaded from where `clip` came from. A model that was built
            in memory came from nowhere: without these two the folder holds the model alone, and a warning says so.
        **overrides: Fields of the `token_recovery` section.

    Returns:
        The folder. It appears whole or not at all. Weights keep their dtype.

    Raises:
        ValueError: A CLIP or a LLaVA that does not fit, an unknown field.
        FileExistsError: The output folder holds something.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; name a new one or remove it.")
    if "text_encoder_config" in overrides:
        raise ValueError("text_encoder_config follows from clip; clip=None (--visual-only) makes a visual-only model.")
    section = TokenRecoveryConfig.from_preset(preset, **overrides)
    model_type = _model_type(llava, "llava", FAMILIES)
    if clip is None and get_method(section.method).needs_text:
        raise ValueError(f"Method {section.method!r} needs the question, and so a CLIP: clip is None.")
    stock_class, config_class, model_class, processor_class = FAMILIES[model_type]
    stock = _load(llava, stock_class, "llava")
    clip_model = None
    if clip is not None:
        _model_type(clip, "clip", ("clip",))
        clip_model = _load(clip, CLIPModel, "clip")
        check_clip(stock.config.vision_config, clip_model.config)
        check_same_tower(stock, clip_model)
        section = section.replace({"text_encoder_config": text_encoder_config(clip_model.config)})
        clip_tokenizer = clip_tokenizer or _beside(clip, AutoTokenizer)
    processor = processor or _beside(llava, AutoProcessor)
    complete = processor is not None and (clip is None or clip_tokenizer is not None)
    if not complete:
        logger.warning(
            f"{output} gets no processor: llava or clip is a model that was not loaded from a folder. Pass processor= "
            "and clip_tokenizer=, or save a processor there yourself."
        )
    fields = stock.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    with torch.device("meta"):  # its weights are the sources' own, so none are made here
        model = model_class(config_class(token_recovery=section, **fields))
    model = build_model(model, stock, clip_model)
    _publish(output, model, build_processor(processor_class, processor, clip_tokenizer, section) if complete else None)
    return output


def build_model(model: PreTrainedModel, stock: PreTrainedModel, clip: CLIPModel | None) -> PreTrainedModel:
    """Give a new compressed model the stock model's weights and CLIP's text side; every weight is accounted for.

    Raises:
        RuntimeError: A weight of the new model that neither source has, or the other way round.
    """
    weights = dict(stock.state_dict())
    if clip is not None:
        weights |= {f"token_recovery.{name}": value for name, value in _text_weights(clip).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.generation_config = stock.generation_config
    return model.eval()


def build_processor(processor_class: Any, stock: Any, clip_tokenizer: Any, section: TokenRecoveryConfig) -> Any:
    """The stock processor with the question's tokenizer."""
    encoder = section.text_encoder_config
    return processor_class(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        chat_template=stock.chat_template,
        image_token=stock.image_token,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        recovery_tokenizer=clip_tokenizer,
        recovery_max_length=None if encoder is None else encoder["max_position_embeddings"],
    )


def check_clip(vision: Any, clip: Any) -> None:
    """Refuse a CLIP whose vision tower cannot be the one that LLaVA uses.

    Raises:
        ValueError: Another width, patch size, image size or number of blocks.
    """
    for name in ("hidden_size", "patch_size", "image_size", "num_hidden_layers"):
        ours, theirs = getattr(vision, name), getattr(clip.vision_config, name)
        if ours != theirs:
            raise ValueError(
                f"The CLIP does not fit LLaVA's vision tower: {name} is {theirs} in the CLIP and {ours} in LLaVA. "
                "Use the CLIP that the tower came from (for LLaVA-1.5 openai/clip-vit-large-patch14-336)."
            )


def check_same_tower(llava: PreTrainedModel, clip: CLIPModel) -> None:
    """Compare LLaVA's vision tower with the CLIP's: equal is silent, a fine-tuned one a warning.

    Raises:
        ValueError: Weights so different that LLaVA's tower cannot come from this CLIP.
    """
    ours = compat.clip_vision_model(llava.model.vision_tower).state_dict()
    theirs = compat.clip_vision_model(clip.vision_model).state_dict()
    names = [name for name, value in ours.items() if value.ndim > 1]
    pairs = [(ours[name].float().flatten(), theirs[name].float().flatten()) for name in names]
    if all(torch.equal(*pair) for pair in pairs):
        return
    cosine = sum(torch.cosine_similarity(*pair, dim=0).item() for pair in pairs) / len(pairs)
    if cosine < 0.5:
        raise ValueError(
            f"LLaVA's vision tower does not come from this CLIP: the mean cosine of their weights is {cosine:.2f}. "
            "Use the CLIP that the tower came from, or clip=None (--visual-only)."
        )
    logger.warning(
        f"LLaVA's vision tower differs from the CLIP's (mean cosine of their weights {cosine:.4f}): it was "
        "fine-tuned, or is another CLIP's, so the text encoder may say less well which patches belong to the question."
    )


def text_encoder_config(clip: Any) -> dict[str, Any]:
    """The text encoder's config, with the projection width that CLIP keeps at its top level."""
    config = clip.text_config.to_diff_dict()
    config["projection_dim"] = clip.projection_dim
    config["model_type"] = "clip_text_model"
    for name in ("dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    return config


def _text_weights(clip: CLIPModel) -> dict[str, Any]:
    """CLIP's text side under the names of `CLIPTextModelWithProjection`, and the visual projection."""
    modules: dict[str, nn.Module] = {
        "text_encoder.text_model": clip.text_model,
        "text_encoder.text_projection": clip.text_projection,
        "visual_projection": clip.visual_projection,
    }
    return {
        f"{prefix}.{name}": value for prefix, module in modules.items() for name, value in module.state_dict().items()
    }


def _model_type(source: Source, argument: str, known: Collection[str]) -> str:
    """The model type of a source, which must be one of `known`."""
    if isinstance(source, PreTrainedModel):
        model_type = source.config.model_type
    else:
        name = os.fspath(source)
        looks_like_a_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
        if looks_like_a_path and not os.path.isdir(name):
            raise FileNotFoundError(f"{argument}: there is no folder {name}.")
        model_type = AutoConfig.from_pretrained(source).model_type
    if model_type not in known:
        raise ValueError(f"{argument} must be of model_type {' or '.join(map(repr, known))}, got {model_type!r}.")
    return model_type


def _load(source: Source, model_class: Any, argument: str) -> Any:
    if isinstance(source, PreTrainedModel):
        model = source
        if not isinstance(model, model_class):
            raise ValueError(f"{argument} must be a {model_class.__name__}, got {type(model).__name__}.")
        return model
    model, info = model_class.from_pretrained(source, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{source} is no complete {model_class.__name__}: {len(info['missing_keys'])} weights are missing, "
            f"{', '.join(sorted(info['missing_keys'])[:3])} among them."
        )
    return model


def _beside(source: Source, auto: Any) -> Any:
    """The processor or tokenizer that stands beside a source, `None` for a model that came from no folder."""
    origin = source.name_or_path if isinstance(source, PreTrainedModel) else source
    return auto.from_pretrained(origin) if origin else None


def _publish(output: Path, model: PreTrainedModel, processor: Any) -> None:
    """Write beside the output folder, then move into place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        staging.chmod(0o755)
        if output.exists():
            output.rmdir()
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


__all__ = ["convert"]
