"""From a stock LLaVA and the CLIP that its vision tower came from to a checkpoint of ours. Nothing is trained."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from transformers import AutoProcessor, AutoTokenizer, CLIPModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..core.configuration import TokenRecoveryConfig
from ..core.remote_code import write_remote_code
from .cards import license_of, write_card
from .conversion import shards
from .conversion.checks import check_keys, check_same_tower, check_text_side
from .conversion.plan import FAMILIES, Plan, Source, check_model_type, plan_conversion
from .conversion.proof import prove, prove_processor
from .conversion.shards import DTYPES

logger = logging.getLogger(__name__)

AnySource: TypeAlias = str | os.PathLike[str] | PreTrainedModel


class Conversion(NamedTuple):
    """What a conversion did.

    Attributes:
        folder: The new checkpoint.
        proof: What was proven of it before it got its name, as a sentence.
    """

    folder: Path
    proof: str


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
    **overrides: Any,
) -> Path:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load as a compressed LLaVA.

    LLaVA's weight files are copied as they are, shard by shard, and one more file holds what comes from the CLIP, so
    that a model of any size needs the memory of about one shard.

    Args:
        llava: A stock LLaVA-1.5 or LLaVA-NeXT: a folder, a Hub id, `org/name@revision`, or the loaded model with its
            head.
        clip: The CLIP whose vision tower LLaVA uses, as a folder, a Hub id or a loaded `CLIPModel`; `"auto"` takes
            the one of OpenAI's that has the tower's sizes. `None` makes a visual-only checkpoint.
        output: Folder to write; it must not exist, or be empty.
        preset: Name of a preset, see [`TokenRecoveryConfig.from_preset`].
        processor: LLaVA's processor; by default it is loaded from where `llava` came from.
        clip_tokenizer: CLIP's tokenizer; by default it is loaded from where `clip` came from. A model that was built
            in memory came from nowhere: without these two the folder holds the model alone, and a warning says so.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` to cast the weights; by default they stay as they are.
        force: Take a CLIP whose vision tower has nothing in common with LLaVA's.
        **overrides: Fields of the `token_recovery` section.

    Returns:
        The folder. It appears whole and proven or not at all: before it gets its name, its keys and shapes, its bytes,
        and what its vision tower, projector, text side and choice of tokens compute are compared with the sources.

    Raises:
        ValueError: A CLIP or a LLaVA that does not fit or is not whole, an unknown field.
        FileExistsError: The output folder holds something.
        OSError: A source cannot be had, or the disk is full.
        RuntimeError: The new checkpoint is not what its sources are.
    """
    settings = {"processor": processor, "clip_tokenizer": clip_tokenizer, "dtype": dtype, "force": force}
    return convert_and_prove(llava, clip, output, preset, **settings, **overrides).folder


def convert_and_prove(
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
) -> Conversion:
    """As [`convert`], and say what was proven; `repo` is the Hub id that the model card names."""
    output = Path(output).expanduser()
    check_output(output)
    section = section_of(preset, overrides)
    processor = processor or _beside_model(llava, AutoProcessor)
    clip_tokenizer = clip_tokenizer or _beside_model(clip, AutoTokenizer)
    with _work_folder(output) as work:
        clip_name = None if clip is None else _on_disk(clip, "clip", work)
        plan = plan_conversion(_on_disk(llava, "llava", work), clip_name, section, dtype=dtype)
        if not isinstance(llava, PreTrainedModel):
            processor = processor or AutoProcessor.from_pretrained(plan.llava.folder, trust_remote_code=False)
        if plan.clip is not None and not isinstance(clip, PreTrainedModel):
            folder = plan.clip.folder
            clip_tokenizer = clip_tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if processor is None or (plan.clip is not None and clip_tokenizer is None):
            processor = None
            logger.warning(
                f"{output} gets no processor: llava or clip is a model that was not loaded from a folder. Pass "
                "processor= and clip_tokenizer=, or save a processor there yourself."
            )
        else:
            processor = build_processor(plan, processor, clip_tokenizer)
        staging = work / "new" / output.name  # the card takes its title from the folder's name
        proof = _write(plan, staging, work, processor, force)
        # Only a Hub id's first place is the LLaVA's.
        base_model = plan.hub_ids if plan.llava.hub_id else None
        write_card(staging, base_model=base_model, license=license_of(plan.llava.folder), repo=repo)
        if output.exists():
            output.rmdir()
        staging.rename(output)
    return Conversion(output, proof)


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        FileExistsError: It does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; name a new one or remove it.")
    if output.is_symlink() or os.path.ismount(output) or (output.exists() and output.samefile(Path.cwd())):
        raise FileExistsError(f"{output} is a link, a mount point or the current folder; name a new folder.")


def section_of(preset: str, overrides: dict[str, Any]) -> TokenRecoveryConfig:
    """The preset with single fields overridden; the text encoder is the CLIP's.

    Raises:
        ValueError: An unknown preset or field, a value that is impossible.
    """
    if "text_encoder_config" in overrides:
        raise ValueError("text_encoder_config follows from clip; clip=None (--visual-only) makes a visual-only model.")
    return TokenRecoveryConfig.from_preset(preset, **overrides)


def build_processor(plan: Plan, stock: Any, clip_tokenizer: Any) -> Any:
    """The stock processor with the question's tokenizer."""
    encoder = plan.config.token_recovery.text_encoder_config
    return plan.family.processor_class(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        chat_template=stock.chat_template,
        image_token=stock.image_token,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        recovery_tokenizer=None if encoder is None else clip_tokenizer,
        recovery_max_length=None if encoder is None else encoder["max_position_embeddings"],
    )


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output, so that a rename publishes; it is gone afterwards, come what may."""
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = f".{output.name}-", ".converting"
    for left in output.parent.glob(f"{prefix}*{suffix}"):
        logger.warning(f"{left} is of another conversion, killed or still running. Nothing of it is used; remove it.")
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=output.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _on_disk(source: AnySource, argument: str, work: Path) -> str | os.PathLike[str]:
    """A source as a name; a model in memory is saved first."""
    if not isinstance(source, PreTrainedModel):
        return source
    check_model_type(source.config, argument)
    model_class = FAMILIES[source.config.model_type].stock_class if argument == "llava" else CLIPModel
    if not isinstance(source, model_class):
        raise ValueError(f"{argument} must be a {model_class.__name__}, got {type(source).__name__}.")
    source.save_pretrained(work / argument)
    return work / argument


def _beside_model(source: AnySource | None, auto: Any) -> Any:
    """The processor or tokenizer of the folder that a loaded model came from, `None` where it came from none."""
    if isinstance(source, PreTrainedModel) and source.name_or_path:
        return auto.from_pretrained(source.name_or_path)
    return None


def _write(plan: Plan, staging: Path, work: Path, processor: Any, force: bool) -> str:
    """Write the checkpoint and prove it; returns what was proven."""
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


def _fetch(source: Source, model_class: Any, scratch: Path) -> Source:
    """A source whose weights are safetensors on this disk; PyTorch's own files are read into memory for it."""
    source = source.downloaded()
    if source.headers is not None:
        return source
    if not any(source.folder.glob("pytorch_model*.bin")):
        raise ValueError(f"{source.name} has no weights: neither model*.safetensors nor pytorch_model*.bin.")
    model, info = model_class.from_pretrained(source.folder, dtype="auto", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source.name} is no complete {model_class.__name__}: {len(missing)} weights are missing, "
            f"{', '.join(missing[:3])} among them."
        )
    model.save_pretrained(scratch)
    return source._replace(folder=scratch, headers=shards.read_headers(scratch))


def _write_weights(plan: Plan, llava: Source, clip: Source | None, staging: Path) -> str:
    """Copy LLaVA's shards, write CLIP's text side into one more, and compare the copies."""
    dtype = None if plan.dtype is None else DTYPES[plan.dtype]
    sources = [llava.folder / name for name in sorted({header.file for header in llava.known_headers.values()})]
    names = shards.shard_names(len(sources) + (clip is not None))
    size, free = sum(path.stat().st_size for path in sources), shutil.disk_usage(staging).free
    needed = llava.nbytes(plan.dtype) + (0 if clip is None else clip.nbytes(plan.dtype))
    if needed > free:
        raise OSError(
            f"The disk of {staging} has {free / 1e9:.1f} GB free; the checkpoint needs {needed / 1e9:.1f} GB."
        )
    pairs = [(source, staging / name) for source, name in zip(sources, names, strict=False)]
    with transformers_logging.tqdm(total=2 * size, unit="B", unit_scale=True, desc="Copying weights") as bar:
        for source, target in pairs:
            shards.copy_shard(source, target, dtype, bar.update)
        bar.set_description("Checking the copies")
        for source, target in pairs:
            shards.check_copy(source, target, dtype, bar.update)
    if clip is not None:
        text_side = shards.text_side_tensors(clip.folder, clip.known_headers, dtype)
        shards.write_shard(text_side, staging / names[-1])
    shards.write_index(staging)
    files = f"{len(sources)} weight file{'s' if len(sources) > 1 else ''} of LLaVA"
    return f"{files} {'byte for byte' if dtype is None else f'cast to {plan.dtype}, tensor by tensor'}"


__all__ = ["Conversion", "convert", "convert_and_prove"]
