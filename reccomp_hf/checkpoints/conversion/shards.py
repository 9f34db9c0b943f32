"""The safetensors files of a checkpoint, without loading the model: their headers, and verified copies."""

from __future__ import annotations

import dataclasses
import filecmp
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..hub import split_revision
from ..json_files import write_json
from ..weight_files import WeightFiles, open_shard

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes that weights may be cast to."""
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # bytes; 1 for all others
_BLOCK = 1 << 24  # bytes read at a time
_SAME_PLACE = (  # transformers has written the same weight under several names
    (re.compile(r"^model\.(?=(language_model|vision_tower|multi_modal_projector|image_newline)\b)"), ""),
    (re.compile(r"^language_model\.(?=lm_head\.)"), ""),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
TEXT_SIDE = {
    "text_model.": "token_recovery.text_encoder.text_model.",
    "text_projection.": "token_recovery.text_encoder.text_projection.",
    "visual_projection.": "token_recovery.visual_projection.",
}
"""Start of the keys taken from a CLIP -> their start in a compressed checkpoint."""
# Buffers that old releases wrote and no model reads.
_STALE_BUFFER = re.compile(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$")

Progress: TypeAlias = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in a safetensors header.

    Attributes:
        file: Name of the file that holds the tensor.
        key: Name of the tensor in that file.
        dtype: As the format writes it, `"F16"`.
        shape: Shape of the tensor.
    """

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    def nbytes(self, dtype: str | None = None) -> int:
        """Size in bytes; that of the cast tensor if a dtype is given and the tensor is a floating-point one."""
        size = _SIZES.get(self.dtype, 1)
        if dtype is not None and "F" in self.dtype:
            size = DTYPES[dtype].itemsize
        return math.prod(self.shape) * size


Headers: TypeAlias = "dict[str, TensorHeader]"  # by place, see `place_of`


def place_of(key: str) -> str:
    """The name of a LLaVA's weight that is the same for the keys of every release of transformers, and in memory."""
    for pattern, replacement in _SAME_PLACE:
        key = pattern.sub(replacement, key)
    return key


def is_weight(key: str) -> bool:
    """Whether a key is a model's weight, not a buffer that is computed anyway."""
    return _STALE_BUFFER.search(key) is None


def read_headers(folder: Path) -> Headers:
    """Headers of a checkpoint's safetensors, by place.

    Raises:
        ValueError: A shard is missing or truncated, or lacks keys that the index puts there.
    """
    files = WeightFiles.find(folder)
    if files.missing:
        raise ValueError(f"{folder} lacks {files.describe_missing()}.")
    headers: Headers = {}
    for name in files.names:
        with open_shard(folder / name) as file:
            for key in file.keys():  # noqa: SIM118 not a dict
                tensor = file.get_slice(key)
                if not is_weight(key):
                    continue
                if place_of(key) in headers:
                    raise ValueError(
                        f"{folder} holds {place_of(key)} twice, once in {name}: the shards contradict each other."
                    )
                headers[place_of(key)] = TensorHeader(name, key, tensor.get_dtype(), tuple(tensor.get_shape()))
    absent = [
        (key, name)
        for name, keys in files.keys.items()
        for key in keys
        if is_weight(key) and place_of(key) not in headers
    ]
    if absent:
        key, name = min(absent)
        raise ValueError(f"{folder}: {name} lacks weights that the index puts there, {key} for one.")
    return headers


def read_hub_headers(source: str) -> Headers | None:
    """As `read_headers` for `org/name@revision`; downloads the headers alone. `None` without safetensors."""
    repo, revision = split_revision(source)
    try:
        metadata = get_safetensors_metadata(repo, revision=revision)
    except NotASafetensorsRepoError:
        return None
    return {
        place_of(key): TensorHeader(name, key, info.dtype, tuple(info.shape))
        for name, file in metadata.files_metadata.items()
        for key, info in file.tensors.items()
        if is_weight(key)
    }


def read_tensor(folder: Path, header: TensorHeader) -> Tensor:
    """One tensor of a checkpoint."""
    with open_shard(folder / header.file) as file:
        return file.get_tensor(header.key)


def text_side_tensors(folder: Path, headers: Headers, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors that a compressed checkpoint takes from a CLIP, by their keys in the compressed checkpoint."""
    return {
        place.replace(start, ours, 1): cast(place, read_tensor(folder, header), dtype)
        for start, ours in TEXT_SIDE.items()
        for place, header in headers.items()
        if place.startswith(start)
    }


def copy_shard(source: Path, target: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    """Copy a shard byte for byte, or with its floating-point tensors cast; `progress` receives the bytes read."""
    if not _casts(source, dtype):
        with source.open("rb") as reader, target.open("wb") as writer:
            while block := reader.read(_BLOCK):
                writer.write(block)
                progress(len(block))
        return
    with open_shard(source) as file:
        tensors = {name: cast(name, tensor, dtype) for name, tensor in _tensors(file)}
        write_shard(tensors, target, file.metadata())
    progress(source.stat().st_size)


def check_copy(source: Path, target: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    """Compare a copied shard with its source: byte for byte, or tensor by tensor where it was cast.

    Raises:
        RuntimeError: They differ.
    """
    if not _casts(source, dtype):
        same = filecmp.cmp(source, target, shallow=False)
    else:
        with open_shard(source) as one, open_shard(target) as other:
            same = set(one.keys()) == set(other.keys()) and all(
                _same_bits(cast(name, tensor, dtype), other.get_tensor(name)) for name, tensor in _tensors(one)
            )
    if not same:
        raise RuntimeError(f"{target.name} differs from {source}: the disk or the memory failed; convert again.")
    progress(source.stat().st_size)


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another floating-point dtype; other tensors are unchanged.

    Raises:
        ValueError: A finite value overflows in the dtype.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if result.isinf().any() and not tensor.isinf().any():
        raise ValueError(f"{name} has values that {dtype} cannot hold; use bfloat16, or leave --dtype out.")
    return result


def write_shard(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of those that `save_pretrained` writes."""
    save_file(tensors, path, metadata=metadata or {"format": "pt"})
    path.chmod(0o644)  # safetensors' own choice is 0600


def write_index(paths: list[Path]) -> None:
    """Write the index that names every tensor's file next to the files; nothing for a single file."""
    if len(paths) == 1:
        return
    weight_map, size = {}, 0
    for path in paths:
        with open_shard(path) as file:
            for key in file.keys():  # noqa: SIM118 not a dict
                tensor = file.get_slice(key)
                weight_map[key] = path.name
                size += TensorHeader(path.name, key, tensor.get_dtype(), tuple(tensor.get_shape())).nbytes()
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(paths[0].with_name(SAFE_WEIGHTS_INDEX_NAME), index)


def _tensors(file: safe_open) -> Iterator[tuple[str, Tensor]]:
    return ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 not a dict


def _casts(path: Path, dtype: torch.dtype | None) -> bool:
    """Whether a cast would change anything in a file."""
    if dtype is None:
        return False
    with open_shard(path) as file:
        return any(file.get_slice(key).get_dtype() not in _kept(dtype) for key in file.keys())  # noqa: SIM118


def _kept(dtype: torch.dtype) -> set[str]:
    """Dtypes, as the format writes them, that a cast leaves unchanged."""
    same = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    return {same, "I64", "I32", "I16", "I8", "U8", "BOOL"}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality that holds for NaN too."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


__all__ = [
    "DTYPES",
    "Headers",
    "TensorHeader",
    "check_copy",
    "copy_shard",
    "read_headers",
    "write_index",
    "write_shard",
]
