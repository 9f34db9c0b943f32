"""Loading config, processor and tokenizer of a checkpoint, and checking that they fit; code in it is never run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoProcessor, AutoTokenizer

from ..core.counting import picture_tokens
from ..core.questions import check_prompt_tokenizer, check_question_tokenizer
from ..core.recovery_tokenizer import RECOVERY_TOKENIZER_FOLDER
from ..core.settings import is_int, is_number, shown
from .json_files import read_json

logger = logging.getLogger(__name__)

JSON_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.json",
)
"""Files of a processor and its tokenizer that hold a JSON object."""
_OWN_CODE = "code of its own, which is never run here: only classes of transformers and of this package are used."
_CLIP_TOWER = "clip_vision_model"


def load_config(folder: Path) -> Any:
    """The config in a folder.

    Raises:
        ValueError: It is damaged, or its class is neither transformers' nor this package's.
    """
    fields = read_json(folder / "config.json")
    for name in ("vision_config", "text_config"):
        if not isinstance(fields.get(name, {}), dict):  # transformers would take the defaults for null
            raise ValueError(
                f"{folder / 'config.json'}: {name} must be an object, got {fields[name]!r}. Download or save it again."
            )
    if fields.get("auto_map") and fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder} has the model_type {fields.get('model_type')!r}, which needs {_OWN_CODE}")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_processor(folder: Path) -> Any:
    """The processor in a folder; code that the folder carries is not run.

    Raises:
        ValueError: It cannot be loaded, or its tokenizers do not fit the model.
    """
    return _load(AutoProcessor, folder, "processor")


def check_processor_files(folder: Path, config: Any) -> None:
    """Check that the processor in a folder can be loaded, reads an image, and fits the config.

    Raises:
        ValueError: It does not.
    """
    processor = load_processor(folder)
    try:
        check_processor(processor, config)
    except ValueError as error:
        raise ValueError(f"The processor in {folder} does not fit: {error}") from error


def check_generation_config(folder: Path) -> None:
    """Check the generation_config.json in a folder, which may be absent.

    Raises:
        ValueError: It is damaged, or a field has a value of another type.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    for name, value in read_json(path).items():
        if value is None or name not in _GENERATION:
            continue
        fits, wanted = _GENERATION[name]
        if not fits(value):
            raise ValueError(f"{path}: {name} must be {wanted}, got {shown(value)}. Correct it, or remove the file.")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, see [`load_processor`]."""
    return _load(AutoTokenizer, folder, "tokenizer")


def _is_ids(value: Any) -> bool:
    return is_int(value) or (isinstance(value, list) and bool(value) and all(map(is_int, value)))


_GENERATION: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (is_int, "a token's id")),
    "eos_token_id": (_is_ids, "a token's id or a list of ids"),
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k"),
        (is_int, "an int"),
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"), (is_number, "a number")
    ),
    **dict.fromkeys(("do_sample", "use_cache"), (lambda value: isinstance(value, bool), "true or false")),
}
"""Fields of generation_config.json: a test of their values, and what they must be."""


def build_processor(processor_class: Any, config: Any, stock: Any, clip_tokenizer: Any) -> Any:
    """The stock processor with the question's tokenizer, checked against the config of the new checkpoint.

    Settings that say how many placeholders an image has follow from the config; a warning names those that differ.

    Raises:
        ValueError: The processor does not fit the config.
    """
    encoder = config.token_recovery.text_encoder_config
    processor = processor_class(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        chat_template=stock.chat_template,
        image_token=stock.image_token,
        recovery_tokenizer=None if encoder is None else clip_tokenizer,
        recovery_max_length=None if encoder is None else encoder["max_position_embeddings"],
        **_placeholder_settings(stock, config),
    )
    processor.recovery_rules = config.token_recovery.rules
    check_processor(processor, config)
    return processor


def check_processor(processor: Any, config: Any) -> None:
    """Check that a processor fits the config of a compressed LLaVA: tokenizers, image size, placeholders.

    Raises:
        ValueError: It does not.
    """
    encoder = config.token_recovery.text_encoder_config
    if encoder is None and processor.recovery_tokenizer is not None:
        raise ValueError(
            "The processor has CLIP's tokenizer, but config.json has no token_recovery.text_encoder_config, without "
            "which questions are not read: save model and processor of one checkpoint again."
        )
    if encoder is not None and processor.recovery_tokenizer is None:
        raise ValueError(
            "config.json has a token_recovery.text_encoder_config, but the processor has no recovery_tokenizer: save "
            "model and processor of one checkpoint again."
        )
    if encoder is not None:
        check_question_tokenizer(processor.recovery_tokenizer, encoder)
    vocabulary = config.get_text_config().vocab_size
    check_prompt_tokenizer(processor.tokenizer, vocabulary, processor.image_token, config.image_token_id)
    if config.vision_config.model_type != _CLIP_TOWER or config.vision_feature_select_strategy != "default":
        return
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    given = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if pinpoints is not None and _pairs(given) != _pairs(pinpoints):
        raise ValueError(
            f"The image processor's image_grid_pinpoints {given} differ from the config's {pinpoints}: correct "
            "one of the files, so that images are cut into the tiles that the model expects."
        )
    side = config.vision_config.image_size
    for size in ((side, side), (2 * side, side), (side, 3 * side)):
        _check_picture(processor, config, size)


def _check_picture(processor: Any, config: Any, size: tuple[int, int]) -> None:
    """Encode a blank image; its pixels and placeholders must be those that the model reads."""
    call = {"images": Image.new("RGB", size), "text": processor.image_token, "recovery_text": "What is it?"}
    try:
        inputs = processor(**call, return_tensors="pt")
    except Exception as error:  # image processors raise all kinds of errors for settings that they cannot use
        raise ValueError(
            f"The processor cannot read an image ({type(error).__name__}: {' '.join(str(error).split())}): correct "
            "the sizes and settings in preprocessor_config.json and processor_config.json."
        ) from error
    side, shape = config.vision_config.image_size, tuple(inputs["pixel_values"].shape)
    if shape[-2:] != (side, side):
        raise ValueError(
            f"The image processor makes images of {shape[-1]} x {shape[-2]} pixels, but the vision tower reads {side} "
            f"x {side}: set size and crop_size in preprocessor_config.json (processor_config.json) to {side}."
        )
    _, patches, newlines = picture_tokens(config, size)
    found = int(torch.as_tensor(inputs["input_ids"]).eq(config.image_token_id).sum())
    if found != patches + newlines:
        raise ValueError(
            f"The processor writes {found} placeholders for an image of {size[0]} x {size[1]} pixels, but the model "
            f"gives {patches + newlines} features: set patch_size, vision_feature_select_strategy and "
            "num_additional_image_tokens in processor_config.json to fit config.json."
        )


def _placeholder_settings(stock: Any, config: Any) -> dict[str, Any]:
    """The settings that say how many placeholders an image has, from the config."""
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    given = {name: getattr(stock, name, None) for name in names}
    if config.vision_config.model_type != _CLIP_TOWER:
        return given
    class_tokens = 1
    values = (config.vision_config.patch_size, config.vision_feature_select_strategy, class_tokens)
    wanted = dict(zip(names, values, strict=True))
    for name, value in wanted.items():
        if given[name] != value:
            logger.warning(
                f"The processor's {name} is {given[name]!r}, which does not fit the config: the new checkpoint gets "
                f"{value!r}."
            )
    return wanted


def _pairs(pinpoints: Any) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in pinpoints or ()]


def _load(auto: Any, folder: Path, kind: str) -> Any:
    files = [place / name for place in (folder, folder / RECOVERY_TOKENIZER_FOLDER) for name in JSON_FILES]
    for path in filter(Path.is_file, files):
        read_json(path)
    try:
        return auto.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers raise errors of their own
        raise ValueError(f"The {kind} in {folder} cannot be loaded: {_reason(error, files)}") from error


def _reason(error: Exception, files: list[Path]) -> str:
    """Why a processor or tokenizer cannot be loaded, with the damaged file if one is found."""
    if "trust_remote_code" in str(error):
        return f"it needs {_OWN_CODE}"
    for path in files:
        if path.name == "tokenizer.json" and path.is_file():
            try:
                Tokenizer.from_file(str(path))
            except Exception as damage:  # tokenizers raises bare exceptions
                return f"{path} is not a tokenizer ({damage}). Download or save it again."
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = [
    "build_processor",
    "check_generation_config",
    "check_processor",
    "check_processor_files",
    "load_config",
    "load_processor",
    "load_tokenizer",
]
