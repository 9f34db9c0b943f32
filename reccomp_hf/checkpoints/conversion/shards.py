"""The safetensors files of a checkpoint, without loading the model: what is in them, and copies that are proven."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..completeness import missing_shards
from ..hub import split_revision

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What weights may be cast to."""
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # of others a byte
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
"""What is taken from a CLIP, and its name in a checkpoint of ours."""
# Buffers that old releases wrote and no model reads.
_NO_WEIGHT = re.compile(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$")

Progress: TypeAlias = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says about a tensor.

    Attributes:
        file: Name of the file that holds it.
        key: Its name there.
        dtype: As the format writes it, `"F16"`.
        shape: Its shape.
    """

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    def nbytes(self, dtype: str | None = None) -> int:
        """Its size in bytes, cast if a dtype is named and it is a floating-point tensor."""
        size = _SIZES.get(self.dtype, 1)
        if dtype is not None and "F" in self.dtype:
            size = DTYPES[dtype].itemsize
        return math.prod(self.shape) * size


Headers: TypeAlias = "dict[str, TensorHeader]"  # by place, see `place_of`


def place_of(key: str) -> str:
    """The one name of a LLaVA's weight, whichever release of transformers wrote its key, and in memory too."""
    for pattern, replacement in _SAME_PLACE:
        key = pattern.sub(replacement, key)
    return key


def is_weight(key: str) -> bool:
    """Whether a key is a model's weight, and no buffer that is computed anyway."""
    return _NO_WEIGHT.search(key) is None


def has_safetensors(folder: Path) -> bool:
    """Whether transformers would find safetensors here."""
    return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


def read_headers(folder: Path) -> Headers:
    """Every weight of a checkpoint, by its place.

    Raises:
        ValueError: A shard is missing, broken off, or does not hold what the index says.
    """
    if missing := missing_shards(folder):
        raise ValueError(f"{folder} lacks {len(missing)} of its weight files, {missing[0]} among them.")
    whole = (folder / WHOLE).is_file()
    index = {} if whole else json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    headers: Headers = {}
    for name in [WHOLE] if whole else sorted(set(index.values())):
        with open_shard(folder / name) as file:
            for key in file.keys():  # noqa: SIM118 it is no dict
                tensor = file.get_slice(key)
                if not is_weight(key):
                    continue
                if place_of(key) in headers:
                    raise ValueError(f"{folder} holds {place_of(key)} twice, once in {name}: the shards contradict.")
                headers[place_of(key)] = TensorHeader(name, key, tensor.get_dtype(), tuple(tensor.get_shape()))
    absent = sorted(key for key in index if is_weight(key) and place_of(key) not in headers)
    if absent:
        raise ValueError(f"{folder}: {index[absent[0]]} lacks weights that the index puts there, {absent[0]} for one.")
    return headers


def read_hub_headers(source: str) -> Headers | None:
    """As `read_headers` for `org/name@revision`, of which only headers are downloaded; `None` without safetensors."""
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


def open_shard(path: Path) -> safe_open:
    """Open a safetensors file.

    Raises:
        ValueError: It is none, or broken off.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be broken off; get it again.") from error


def read_tensor(folder: Path, header: TensorHeader) -> Tensor:
    """One tensor of a checkpoint."""
    with open_shard(folder / header.file) as file:
        return file.get_tensor(header.key)


def text_side_tensors(folder: Path, headers: Headers, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a checkpoint of ours takes from a CLIP, under the names it has there."""
    return {
        place.replace(start, ours, 1): cast(place, read_tensor(folder, header), dtype)
        for start, ours in TEXT_SIDE.items()
        for place, header in headers.items()
        if place.startswith(start)
    }


def shard_names(count: int) -> list[str]:
    """What transformers calls the files of a checkpoint of so many."""
    if count == 1:
        return [WHOLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def copy_shard(source: Path, target: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    """Copy a shard byte for byte, or with its floating-point tensors cast; `progress` is told of bytes read."""
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
        raise RuntimeError(f"{target.name} is not what {source} holds: the disk or the memory failed; convert again.")
    progress(source.stat().st_size)


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another floating-point dtype; other kinds stay.

    Raises:
        ValueError: A finite value has no place in the dtype.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if result.isinf().any() and not tensor.isinf().any():
        raise ValueError(f"{name} has values that {dtype} cannot hold; use bfloat16, or leave --dtype out.")
    return result


def write_shard(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read, as they may those of `save_pretrained`."""
    save_file(tensors, path, metadata=metadata or {"format": "pt"})
    path.chmod(0o644)  # safetensors' own choice is 0600


def write_index(folder: Path) -> None:
    """Name every tensor's file, if there is more than one file."""
    weight_map, size = {}, 0
    paths = sorted(folder.glob("model*.safetensors"))
    for path in paths:
        with open_shard(path) as file:
            for key in file.keys():  # noqa: SIM118 it is no dict
                tensor = file.get_slice(key)
                weight_map[key] = path.name
                size += TensorHeader(path.name, key, tensor.get_dtype(), tuple(tensor.get_shape())).nbytes()
    if len(paths) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(file: safe_open) -> Iterator[tuple[str, Tensor]]:
    return ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 it is no dict


def _casts(path: Path, dtype: torch.dtype | None) -> bool:
    """Whether a cast would change anything in a file."""
    if dtype is None:
        return False
    with open_shard(path) as file:
        return any(file.get_slice(key).get_dtype() not in _kept(dtype) for key in file.keys())  # noqa: SIM118


def _kept(dtype: torch.dtype) -> set[str]:
    """Dtypes, as the format writes them, that a cast leaves as they are."""
    same = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    return {same, "I64", "I32", "I16", "I8", "U8", "BOOL"}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality that takes a NaN for itself."""
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
