"""Converting a stock LLaVA and the CLIP of its vision tower into a compressed LLaVA; nothing is trained."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoProcessor, AutoTokenizer, CLIPModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..core.configuration import TokenRecoveryConfig
from ..core.remote_code import write_remote_code
from .cards import license_of, write_card
from .conversion import shards
from .conversion.compatibility import check_keys, check_same_tower, check_text_side
from .conversion.plan import FAMILIES, Plan, Source, check_model_type, plan_conversion
from .conversion.proof import prove, prove_processor
from .conversion.shards import DTYPES
from .conversion_record import ConversionRecord
from .processors import build_processor, load_processor, load_tokenizer
from .weight_files import NO_WEIGHTS, WeightFiles, shard_names
from .work_folder import work_folder

logger = logging.getLogger(__name__)

AnySource: TypeAlias = str | os.PathLike[str] | PreTrainedModel


def convert(
    llava: AnySource,
    clip: AnySource | None,
    output: str | os.PathLike[str],
    preset: str = "paper",
    *,
    processor: Any = None,
    clip_tokenizer: Any = None,
    dtype: str | None = None,
    force: bool = False,
    repo: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load as a compressed LLaVA.

    LLaVA's weight files are copied one by one, and one more file holds the weights from the CLIP, so that a model of
    any size needs the memory of about one shard. The result is verified before the folder is created: its keys, shapes
    and bytes, and the outputs of its vision tower, projector, text side and choice of tokens are compared with the
    sources.

    Args:
        llava: A stock LLaVA-1.5 or LLaVA-NeXT: a folder, a Hub id, `org/name@revision`, or the loaded model with its
            head.
        clip: The CLIP whose vision tower LLaVA uses, as a folder, a Hub id or a loaded `CLIPModel`; `"auto"` takes
            OpenAI's CLIP with the tower's sizes. `None` makes a visual-only checkpoint.
        output: Folder to write; it must be empty or not exist.
        preset: Name of a preset, see [`TokenRecoveryConfig.from_preset`].
        processor: LLaVA's processor; by default it is loaded from where `llava` came from.
        clip_tokenizer: CLIP's tokenizer; by default it is loaded from where `clip` came from. A model that was built
            in memory did not come from anywhere: without these two the folder holds the model alone, and a warning
            says so.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` to cast the weights; by default they keep their dtypes.
        force: Accept a CLIP whose vision tower is unrelated to LLaVA's.
        repo: Hub id that the model card names, for a checkpoint that will be pushed there.
        **overrides: Fields of the `token_recovery` section.

    Returns:
        The folder. After an error nothing is left of it.

    Raises:
        ValueError: A CLIP or a LLaVA that does not fit or is incomplete, an unknown field.
        FileExistsError: The output folder is not empty.
        OSError: A source is missing or cannot be downloaded, or the disk is full.
        RuntimeError: The new checkpoint differs from its sources.
    """
    output = Path(output).expanduser()
    check_output(output)
    section = section_of(preset, overrides)
    processor = processor or _saved_with_model(llava, AutoProcessor)
    clip_tokenizer = clip_tokenizer or _saved_with_model(clip, AutoTokenizer)
    with work_folder(output) as work:
        clip_name = None if clip is None else _on_disk(clip, "clip", work)
        plan = plan_conversion(_on_disk(llava, "llava", work), clip_name, section, dtype=dtype)
        without_llava = processor is None and isinstance(llava, PreTrainedModel)
        without_clip = clip_tokenizer is None and isinstance(clip, PreTrainedModel)
        if without_llava or without_clip:
            processor = None
            logger.warning(
                f"{output} gets no processor: llava or clip is a model that was not loaded from a folder. Pass "
                "processor= and clip_tokenizer=, or save a processor there yourself."
            )
        else:
            processor = plan_processor(plan, processor, clip_tokenizer)
        staging = work / "new" / output.name  # the card takes its title from the folder's name
        proof = _write(plan, staging, work, processor, force)
        given = {name: value for name, value in section.to_dict().items() if name in overrides}
        _record(plan, preset, given, force, proof).write(staging)
        # The first id of a card is taken for the LLaVA's.
        base_model = plan.hub_ids if plan.llava.hub_id else None
        write_card(staging, base_model=base_model, license=license_of(plan.llava.folder), repo=repo)
        if output.exists():
            output.rmdir()
        staging.rename(output)
    return output


def check_output(output: Path) -> None:
    """Check that an output folder is empty or does not exist.

    Raises:
        FileExistsError: It holds something, or cannot be replaced by a rename.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; name a new one or remove it.")
    if output.is_symlink() or os.path.ismount(output) or (output.exists() and output.samefile(Path.cwd())):
        raise FileExistsError(f"{output} is a link, a mount point or the current folder; name a new folder.")


def section_of(preset: str, overrides: dict[str, Any]) -> TokenRecoveryConfig:
    """The preset with some fields overridden, still without the text encoder, which the CLIP brings.

    Raises:
        ValueError: An unknown preset or field, a value that is impossible.
    """
    if "text_encoder_config" in overrides:
        raise ValueError("text_encoder_config follows from clip; clip=None (--visual-only) makes a visual-only model.")
    return TokenRecoveryConfig.from_preset(preset, **overrides)


def plan_processor(plan: Plan, stock: Any = None, clip_tokenizer: Any = None) -> Any:
    """The processor of the new checkpoint, checked before any weight is read; missing parts are the sources' own.

    Raises:
        ValueError: A part cannot be loaded or does not fit the model.
    """
    stock = stock or load_processor(plan.llava.folder)
    if plan.clip is not None:
        clip_tokenizer = clip_tokenizer or load_tokenizer(plan.clip.folder)
    return build_processor(plan.family.processor_class, plan.config, stock, clip_tokenizer)


def _on_disk(source: AnySource, argument: str, work: Path) -> str | os.PathLike[str]:
    """The name of a source; a model in memory is saved first."""
    if not isinstance(source, PreTrainedModel):
        return source
    check_model_type(source.config, argument)
    model_class = FAMILIES[source.config.model_type].stock_class if argument == "llava" else CLIPModel
    if not isinstance(source, model_class):
        raise ValueError(f"{argument} must be a {model_class.__name__}, got {type(source).__name__}.")
    source.save_pretrained(work / argument)
    return work / argument


def _saved_with_model(source: AnySource | None, auto: Any) -> Any:
    """The processor or tokenizer in the folder that a loaded model came from, `None` for any other source."""
    if isinstance(source, PreTrainedModel) and source.name_or_path:
        return auto.from_pretrained(source.name_or_path, trust_remote_code=False)
    return None


def _write(plan: Plan, staging: Path, work: Path, processor: Any, force: bool) -> str:
    """Write the checkpoint and verify it; returns what was verified."""
    llava = _fetch(plan.llava, plan.family.stock_class, work / "llava_safetensors")
    clip = None if plan.clip is None else _fetch(plan.clip, CLIPModel, work / "clip_safetensors")
    llava_weights = llava.folder, llava.known_headers
    if plan.llava.headers is None:
        check_keys(llava_weights[1], plan.family.stock_class, llava.config, llava.name)
    if clip is not None:
        check_text_side(clip.known_headers, clip.name)
        check_same_tower(llava_weights, (clip.folder, clip.known_headers), force=force)
    staging.mkdir(parents=True)
    proof = _write_weights(plan, llava, clip, staging)
    plan.config.architectures = [plan.family.model_class.__name__]
    plan.config.save_pretrained(staging)
    if (plan.llava.folder / "generation_config.json").is_file():
        shutil.copyfile(plan.llava.folder / "generation_config.json", staging / "generation_config.json")
    if processor is not None:
        processor.save_pretrained(staging)
        prove_processor(staging, processor)
    check_keys(shards.read_headers(staging), plan.family.model_class, plan.config, "the new checkpoint")
    clip_folder = None if clip is None else clip.folder
    proof += f"; {prove(staging, plan.family.model_class, plan.config, llava_weights, clip_folder)}."
    write_remote_code(staging)
    return proof


def _record(plan: Plan, preset: str, fields: dict[str, Any], force: bool, proof: str) -> ConversionRecord:
    """The record of a conversion; sources that are not on the Hub have no name there that means anything to others."""
    llava, clip = (
        None if source is None or source.hub_id is None else source.name for source in (plan.llava, plan.clip)
    )
    return ConversionRecord(preset, fields, llava, clip, plan.clip is None, plan.dtype, force, proof)


def _fetch(source: Source, model_class: Any, scratch: Path) -> Source:
    """A source with its weights as safetensors on this disk; PyTorch's own files are loaded and saved again."""
    source = source.downloaded()
    if source.headers is not None:
        return source
    if not WeightFiles.find(source.folder).names:
        raise ValueError(f"{NO_WEIGHTS.format(source.name)}.")
    model, info = model_class.from_pretrained(source.folder, dtype="auto", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source.name} is not a complete {model_class.__name__}: {len(missing)} weights are missing, "
            f"{', '.join(missing[:3])} among them."
        )
    model.save_pretrained(scratch)
    return source._replace(folder=scratch, headers=shards.read_headers(scratch))


def _write_weights(plan: Plan, llava: Source, clip: Source | None, staging: Path) -> str:
    """Copy LLaVA's shards, write CLIP's text side into one more, and compare the copies."""
    dtype = None if plan.dtype is None else DTYPES[plan.dtype]
    sources = [llava.folder / name for name in sorted({header.file for header in llava.known_headers.values()})]
    targets = [staging / name for name in shard_names(len(sources) + (clip is not None))]
    size, free = sum(path.stat().st_size for path in sources), shutil.disk_usage(staging).free
    needed = llava.nbytes(plan.dtype) + (0 if clip is None else clip.nbytes(plan.dtype))
    if needed > free:
        raise OSError(
            f"The disk of {staging} has {free / 1e9:.1f} GB free; the checkpoint needs {needed / 1e9:.1f} GB."
        )
    pairs = list(zip(sources, targets, strict=False))
    with transformers_logging.tqdm(total=2 * size, unit="B", unit_scale=True, desc="Copying weights") as bar:
        for source, target in pairs:
            shards.copy_shard(source, target, dtype, bar.update)
        bar.set_description("Checking the copies")
        for source, target in pairs:
            shards.check_copy(source, target, dtype, bar.update)
    if clip is not None:
        text_side = shards.text_side_tensors(clip.folder, clip.known_headers, dtype)
        shards.write_shard(text_side, targets[-1])
    shards.write_index(targets)
    files = f"{len(sources)} weight file{'s' if len(sources) > 1 else ''} of LLaVA"
    return f"{files} {'byte for byte' if dtype is None else f'cast to {plan.dtype}, tensor by tensor'}"


__all__ = ["convert"]
