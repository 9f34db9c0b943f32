"""Names of weights: from a checkpoint's to vLLM's, and the checks that none is lost on the way."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from vllm.model_executor.models.utils import WeightsMapper

_LANGUAGE_MODEL = "language_model."

# transformers 5 writes a vision tower's keys without `vision_model.`.
_VISION_KEYS = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


class _AdapterMapper(WeightsMapper):
    """Names of an adapter, which vLLM maps one by one before it keeps those that it supports and drops the others."""

    def map_name(self, key: str) -> str | None:
        """Map a name.

        Raises:
            ValueError: The weight belongs to the vision tower, the projector or the text encoder.
        """
        name = super().map_name(key)
        if name is not None and ".lora_" in name and not name.startswith(_LANGUAGE_MODEL):
            raise ValueError(
                f"The adapter trains {name.partition('.lora_')[0]}, but vLLM applies adapters to the language model "
                "only: its answers would silently be the base model's. Merge the adapter into the checkpoint first "
                "(model.merge_and_unload(), then save_pretrained), or train it on the language model alone."
            )
        return name


class KeyMapper(WeightsMapper):
    """Maps the keys of checkpoints of transformers 4 and 5, and refuses adapters that vLLM would drop in part."""

    @classmethod
    def of(cls, stock: WeightsMapper) -> KeyMapper:
        """The mapper of a stock class with our keys added."""
        return cls(**_fields(stock | _VISION_KEYS))

    def get_rename_mapper(self) -> WeightsMapper:
        """The mapper that vLLM uses for the names of adapters."""
        return _AdapterMapper(**_fields(super().get_rename_mapper()))


def check_loaded(model: Any, loaded: set[str]) -> None:
    """Check that a model's weights and biases were all in the checkpoint; vLLM does so only without quantisation.

    Args:
        model: vLLM's model.
        loaded: Names of the parameters that were loaded.

    Raises:
        ValueError: Some were not.
    """
    needed = {name for name, _ in model.named_parameters() if name.endswith((".weight", ".bias"))}
    if model.token_recovery is not None:
        needed |= {f"token_recovery.{name}" for name in model.token_recovery.state_dict()}
    missing = sorted(needed - loaded)
    if not missing:
        return
    if all(name.startswith("token_recovery.") for name in missing):
        raise ValueError(
            f"The checkpoint lacks {len(missing)} weights of CLIP's text encoder, among them {missing[0]}. "
            "Convert it again: reccomp_hf.convert(llava, clip, output)."
        )
    raise ValueError(
        f"{len(missing)} of {len(needed)} weights were not loaded from the checkpoint, among them {missing[0]}: its "
        "keys, or the names in the metadata of its files, do not fit. Save a model that TorchAO quantised again, with "
        "this version of reccomp_hf (model.save_pretrained)."
    )


def _fields(mapper: WeightsMapper) -> dict[str, Any]:
    return {field.name: getattr(mapper, field.name) for field in dataclasses.fields(mapper)}


__all__ = ["KeyMapper", "check_loaded"]
