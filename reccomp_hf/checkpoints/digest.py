"""The digest of a checkpoint that is not loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..data.fingerprint import digested_fields
from .weight_files import WeightFiles, open_shard


def checkpoint_digest(folder: str | Path) -> str:
    """Digest of a checkpoint's config, and of its weights' names, shapes and first values.

    Raises:
        ValueError: There are no safetensors files, or one is damaged.
    """
    source = Path(folder)
    files = [file for name in ("config.json", "generation_config.json") if (file := source / name).is_file()]
    configs = [digested_fields(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    weights = WeightFiles.find(source)
    if not (weights.complete and weights.safetensors):
        raise ValueError(f"{folder} has no safetensors files, or not all of them: save or download it again.")
    for path in weights.present:
        with open_shard(path) as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                digest.update(f"{name} {part.get_shape()}".encode())
                value = part[:1] if part.get_shape() else file.get_tensor(name)
                digest.update(value.flatten()[:4].float().numpy().tobytes())
    return digest.hexdigest()


__all__ = ["checkpoint_digest"]
