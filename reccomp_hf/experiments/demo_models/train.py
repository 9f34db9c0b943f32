"""Train a demo checkpoint from scratch.

`python -m reccomp_hf.experiments.demo_models.train --model demo --output FOLDER` draws the scenes once, trains a CLIP
on them, then a LLaVA on its frozen vision tower, and converts both. It saves its state every few minutes: the same
command resumes a run that was killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from ...cli.options import HelpFormatter, count
from ...demo.scenes import TRAIN_SEEDS, VALIDATION_SEEDS
from .clip import new_clip, train_clip
from .config import MODELS, SCALES, TrainingConfig
from .data import cached_scenes, file_in_place, validation_scenes
from .llava import accuracy, new_llava, train_llava
from .loop import Figures
from .package import save_stock, ship
from .tokenizers import save_clip_tokenizer, save_llama_tokenizer

logger = logging.getLogger(__name__)


def train(
    name: str, config: TrainingConfig, output: Path, cache: Path | None = None, device: str = "cpu", threads: int = 1
) -> Path:
    """Train one of the demo models, or resume its training.

    Args:
        name: A key of `MODELS`.
        config: Sizes and lengths.
        output: Folder of the run; it must be new, or hold a run of the same model and config.
        cache: Folder of drawn scenes, which several runs may share; by default inside `output`.
        device: The device to train on.
        threads: Processes that draw scenes.

    Returns:
        `output / "final"`: the converted checkpoint in float16, with a `training.json` that describes the training.

    Raises:
        ValueError: An unknown model, more scenes than there are training seeds, or a folder of another run.
    """
    if name not in MODELS:
        raise ValueError(f"There is no demo model {name!r} to train. Choose one of: {', '.join(MODELS)}.")
    if config.scenes + config.close_ups > len(TRAIN_SEEDS):
        raise ValueError(
            f"There are {len(TRAIN_SEEDS)} training seeds, but scenes and close_ups are {config.scenes} and "
            f"{config.close_ups}."
        )
    final = output / "final"
    _claim(output, {"model": name, **dataclasses.asdict(config)})
    if (final / "training.json").exists():
        logger.info("%s is complete", final)
        return final
    save_clip_tokenizer(output / "tokenizers" / "clip")
    save_llama_tokenizer(output / "tokenizers" / "llama")
    clip_tokenizer = AutoTokenizer.from_pretrained(output / "tokenizers" / "clip")
    llama_tokenizer = AutoTokenizer.from_pretrained(output / "tokenizers" / "llama")
    drawn = cache or output / "cache"
    scenes = cached_scenes(drawn, TRAIN_SEEDS[: config.scenes], threads)
    close_up_seeds = TRAIN_SEEDS[config.scenes : config.scenes + config.close_ups]
    close_ups = cached_scenes(drawn, close_up_seeds, threads, close_ups=True)
    monitored = validation_scenes(config.monitored_scenes)

    clip = new_clip(config, clip_tokenizer).to(device)
    clip_history = train_clip(
        clip, clip_tokenizer, scenes, close_ups, monitored, config, MODELS[name], output / "clip.pt"
    )
    llava = new_llava(config, clip, len(llama_tokenizer)).to(device)
    llava_history = train_llava(llava, llama_tokenizer, scenes, monitored, config, output)

    facts = _facts(name, config, clip_history, llava_history)
    validation = validation_scenes(config.validation_scenes)
    facts["validation"]["accuracy"] = accuracy(llava, llama_tokenizer, validation, config)
    facts["parameters"] = {key: _size(model) for key, model in (("clip", clip), ("llava", llava))}
    logger.info("uncompressed accuracy on %d validation scenes: %s", config.validation_scenes, facts["validation"])
    ship(*save_stock(clip, llava, config, output / "stock"), final, facts)
    logger.info("the checkpoint is in %s", final)
    return final


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a run in its folder, or check them."""
    file = output / "run.json"
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(key for key in settings if settings[key] != known.get(key))
        if differing:
            raise ValueError(
                f"{output} holds a run with other settings of {', '.join(differing)}; see {file}. Use those "
                "settings, or name another --output."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    with file_in_place(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _facts(
    name: str, config: TrainingConfig, clip_history: list[Figures], llava_history: list[Figures]
) -> dict[str, Any]:
    return {
        "model": name,
        "box_supervision": MODELS[name],
        "scenes": config.scenes,
        "train_seeds": [TRAIN_SEEDS.start, TRAIN_SEEDS.start + config.scenes],
        "config": dataclasses.asdict(config),
        "clip_history": clip_history,
        "llava_history": llava_history,
        "validation": {"seeds": [VALIDATION_SEEDS.start, VALIDATION_SEEDS.start + config.validation_scenes]},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: list[str] | None = None) -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.demo_models.train",
        description="Trains a demo checkpoint, or resumes where training stopped.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", required=True, choices=MODELS, help="demo: its CLIP is trained with boxes")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run; its final/ is the checkpoint")
    parser.add_argument("--cache", type=Path, help="folder of drawn scenes, to share (default: cache/ in the output)")
    parser.add_argument("--scale", default="small", choices=SCALES, help="llava-1.5: 24 x 24 patches, for a GPU")
    parser.add_argument("--scenes", type=int, help="number of training scenes (default: the scale's)")
    parser.add_argument("--clip-steps", type=int, help="training steps of the CLIP (default: the scale's)")
    parser.add_argument("--llava-steps", type=int, help="training steps of the LLaVA (default: the scale's)")
    parser.add_argument("--llava-seed", type=int, help="seed of the LLaVA stage (default: the scale's)")
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument("--threads", type=count, default=2, help="CPU threads")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    try:
        config = _config(arguments)
        train(arguments.model, config, arguments.output, arguments.cache, arguments.device, arguments.threads)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _config(arguments: argparse.Namespace) -> TrainingConfig:
    config = SCALES[arguments.scale]
    clip, llava = config.clip, config.llava
    if arguments.clip_steps is not None:
        clip = dataclasses.replace(clip, steps=arguments.clip_steps)
    if arguments.llava_steps is not None:
        llava = dataclasses.replace(llava, steps=arguments.llava_steps)
    if arguments.llava_seed is not None:
        llava = dataclasses.replace(llava, seed=arguments.llava_seed)
    scenes = config.scenes if arguments.scenes is None else arguments.scenes
    return dataclasses.replace(config, clip=clip, llava=llava, scenes=scenes)


if __name__ == "__main__":
    raise SystemExit(main())
