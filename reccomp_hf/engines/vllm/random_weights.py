"""A checkpoint folder without weights, which vLLM fills with random ones (`load_format="dummy"`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...core.checks import is_tiled
from ...demo import checkpoint_folder

_VOCABULARY = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")


def write_without_weights(config: Any, folder: Path) -> None:
    """Write the config of a model with the tokenizers and the processor of `demo`, fitted to each other.

    Args:
        config: A LLaVA-1.5's config, of which vocabularies and special tokens become those of the tokenizers. That
            leaves a language model of 7B without 4 % of its parameters.
        folder: The folder to write to.

    Raises:
        ValueError: The config is LLaVA-NeXT's, whose processor `demo` does not have.
    """
    if is_tiled(config):
        raise ValueError(
            "With --engine vllm a --config must be a LLaVA-1.5, got a LLaVA-NeXT: name a checkpoint, which has a "
            "processor of its own."
        )
    demo = checkpoint_folder("demo")
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    fields, theirs = config.to_dict(), _read(demo / "config.json")
    fields |= {name: theirs[name] for name in ("architectures", "image_token_index")}
    fields["pad_token_id"] = theirs["text_config"]["pad_token_id"]
    fields["text_config"] |= {name: theirs["text_config"][name] for name in _VOCABULARY}
    encoder, processor = fields["token_recovery"]["text_encoder_config"], _read(demo / "processor_config.json")
    encoder |= {name: theirs["token_recovery"]["text_encoder_config"][name] for name in _VOCABULARY}
    size = config.vision_config.image_size
    processor["image_processor"] |= {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
    processor |= {
        "patch_size": config.vision_config.patch_size,
        "recovery_max_length": encoder["max_position_embeddings"],
    }
    for name, values in (("config.json", fields), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(values), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


__all__ = ["write_without_weights"]
