"""Differences between the versions of transformers; no other file asks for a version."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import is_accelerate_available

IS_V5 = Version(transformers.__version__) >= Version("5.0.0.dev0")

_STANDARD_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the key-value cache in stock methods and outputs: `"cache"` from 5.24 on."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, under either name; `None` without one."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def stock_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the cache under a name that the stock method takes.

    From 5.24 on it takes both, and warns of the older one itself.
    """
    others = {name: value for name, value in arguments.items() if name != "cache"}
    return others if arguments.get("cache") is None else {**others, CACHE: arguments["cache"]}


def fill_cache(cache: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    """Write a layer's keys and values (R, H, L, C) to an empty cache of any kind."""
    places = {} if IS_V5 else {"cache_position": torch.arange(keys.shape[2], device=keys.device)}
    cache.update(keys, values, layer, places)


def image_fields(output_class: type, features: Tensor, lengths: list[int]) -> dict[str, Any]:
    """Fields of an output for the projected tokens (tokens, D) of all images, and the number of each image's."""
    fields: dict[str, Any] = {"image_hidden_states": features}
    if "image_outputs" in {field.name for field in dataclasses.fields(output_class)}:
        fields["image_outputs"] = BaseModelOutputWithPooling(pooler_output=list(features.split(lengths)))
    return fields


def stock_image_fields(output: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a stock output that 5.24 replaced by `image_outputs`; nothing if the output has it."""
    encoded = output.get("image_outputs")
    return {} if encoded is None else {"image_hidden_states": torch.cat(list(encoded.pooler_output))}


def clip_vision_model(tower: nn.Module) -> Any:
    """The module of a CLIP vision tower that holds `encoder` and `post_layernorm`."""
    return getattr(tower, "vision_model", tower)


def run_block(block: nn.Module, states: Tensor) -> Tensor:
    """A CLIP vision block on (B, N + 1, C), without a mask."""
    return block(states, None) if IS_V5 else block(states, None, None)[0]


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, fetched from the device or disk that accelerate offloaded it to."""
    value: Tensor = getattr(module, name)
    if not value.is_meta:
        return value
    if (
        is_accelerate_available()
    ):  # it offloaded the weight; the condition keeps it optional for a checkpoint's own code
        from accelerate.utils import align_module_device

        with align_module_device(module):
            return getattr(module, name).clone()
    raise RuntimeError(f"{name} is on the meta device and accelerate is not installed: the weight was never loaded.")


def register_key_renames(class_name: str, model_type: str) -> None:
    """Give a class the checkpoint renames of the stock class it extends.

    On 5.x renames skip classes defined outside transformers, and a stock checkpoint would load with a random
    `lm_head`. On 4.57 they are inherited as a class attribute.
    """
    if not IS_V5:
        return
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    # The package and a remote copy of it may both run this; they register the same mapping.
    mapping = get_checkpoint_conversion_mapping(model_type)
    register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)


def state_on_disk(model: Any) -> dict[str, Tensor]:
    """The state dict of a model, by the keys and in the shapes that `save_pretrained` writes."""
    if not IS_V5:  # keys are the same but for renames
        return model.state_dict()
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


def key_options(model: Any) -> dict[str, Any]:
    """Arguments of `save_pretrained` that keep the keys of a file equal to the names in its metadata.

    With TorchAO 5.x describes each weight in the metadata by its module, but writes the keys of a stock checkpoint,
    which then have no description: vLLM, which reads the metadata, would load none of them.
    """
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    is_torchao = getattr(method, "quant_method", None) == "torchao"
    return {"save_original_format": False} if IS_V5 and is_torchao else {}


def rename_vision_key(key: str) -> str:
    """On 4.57, add to a CLIP tower's key the `vision_model.` that 5.x does not write."""
    for prefix in ("vision_tower.", "model.vision_tower."):
        if not IS_V5 and key.startswith(prefix) and not key.startswith(f"{prefix}vision_model."):
            return f"{prefix}vision_model.{key.removeprefix(prefix)}"
    return key


def default_max_length() -> int | None:
    """The `max_length` of a generation config in which nobody set one."""
    return transformers.GenerationConfig().max_length


def extended_positions(position_ids: Tensor, length: int) -> Tensor:
    """Positions of a prompt continued by one per generated token: (R, L) -> (R, length).

    5.x extends `position_ids` itself while it generates; 4.57 would repeat the last position.
    """
    missing = length - position_ids.shape[1]
    if missing <= 0:
        return position_ids
    steps = position_ids.new_ones((position_ids.shape[0], missing)).cumsum(-1)
    return nn.functional.pad(position_ids, (0, missing)).slice_scatter(
        position_ids[:, -1:] + steps, dim=1, start=position_ids.shape[1]
    )


def behind_cache(past: int, input_ids: Tensor, inputs_embeds: Tensor | None) -> dict[str, Any]:
    """Arguments of the stock `generate` by which (R, L) new ids continue a cache of `past` tokens.

    5.x recognises new ids by their mask, but cuts embeddings as if they covered all of it; 4.57 would cut both.
    """
    if IS_V5:
        padding = (0, 0, past, 0)
        return {} if inputs_embeds is None else {"inputs_embeds": nn.functional.pad(inputs_embeds, padding)}
    places = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
    return {"cache_position": places} | ({} if inputs_embeds is None else {"inputs_embeds": inputs_embeds})


def is_prefill(step: dict[str, Any]) -> bool:
    """Whether the arguments of `prepare_inputs_for_generation` start a sequence."""
    return bool(step.get("is_first_iteration")) if IS_V5 else bool(step["cache_position"][0] == 0)


def mend_tokenizer_config(folder: str) -> None:
    """Rewrite a tokenizer_config.json of transformers 5 so that 4.57 can read it too.

    4.57 knows no TokenizersBackend, wants unnamed special tokens as `additional_special_tokens`, and named ones
    (`image_token`) in a dictionary.
    """
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    before = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens", []), list):
        unnamed = config.pop("extra_special_tokens", [])
        named = {key: value for key, value in config.items() if key.endswith("_token") and key not in _STANDARD_TOKENS}
        config.update({"additional_special_tokens": unnamed} if unnamed else {})
        config.update({"extra_special_tokens": named} if named else {})
    if config != before:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, sort_keys=True, ensure_ascii=False)
            file.write("\n")


def with_listed_content(conversation: Sequence[Any]) -> list[Any]:
    """A copy of chat messages with text parts in place of plain strings or nothing, which 4.57 cannot encode."""
    if isinstance(conversation[0], (list, tuple)):
        return [with_listed_content(messages) for messages in conversation]
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else {**message, "content": message.get("content") or []}
        for message in conversation
    ]


HEADS_OF_PROGRAMS = () if IS_V5 else ("AutoModelForCausalLM",)
"""Auto classes that hold our models only for programs that read no class in `auto_map`."""


def default_auto_map(auto_map: dict[str, str]) -> dict[str, Any]:
    """The config's argument `auto_map` for a config.json that has none.

    Programs that find the class of a model by its config look there (TRL's reference models). It is empty on 4.57,
    which would take `trust_remote_code=True` for a wish to run code that such a folder does not carry: there TRL takes
    `AutoModelForCausalLM`, see `HEADS_OF_PROGRAMS`.
    """
    return {"auto_map": auto_map if IS_V5 else {}}


def takes_processor_kwargs() -> bool:
    """Whether the stock `apply_chat_template` takes the arguments of `__call__` as a dictionary (transformers 5)."""
    return "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters


def auto_model_for_vision2seq() -> Any:
    """`AutoModelForVision2Seq`, or its successor on 5.x."""
    return auto_class("AutoModelForVision2Seq") or transformers.AutoModelForImageTextToText


def auto_class(name: str) -> Any:
    """An Auto class, or `None` where this transformers does not have it."""
    return getattr(transformers, name, None)


__all__ = [
    "CACHE",
    "HEADS_OF_PROGRAMS",
    "IS_V5",
    "auto_class",
    "auto_model_for_vision2seq",
    "behind_cache",
    "cache_of",
    "clip_vision_model",
    "default_auto_map",
    "default_max_length",
    "extended_positions",
    "fill_cache",
    "image_fields",
    "is_prefill",
    "mend_tokenizer_config",
    "parameter",
    "register_key_renames",
    "rename_vision_key",
    "run_block",
    "state_on_disk",
    "stock_cache",
    "stock_image_fields",
    "takes_processor_kwargs",
    "with_listed_content",
]
