"""The cards of `model_cards/`: published LLaVAs after a conversion, and this package's demo models."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checkpoints.cards import CardFacts, folder_facts, render_card
from ..checkpoints.conversion_record import ConversionRecord
from ..demo import CHECKPOINTS, checkpoint_folder
from ..measure.published import FULL_SIZE

SHIPPED = ("llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-vicuna-7b", "llava-v1.6-mistral-7b")
"""Published checkpoints that have a card, in addition to the demo models."""
DEMO_RESULTS = (
    "Accuracy of the uncompressed model on scenes it was not trained on, by kind of question: {validation}. The "
    "README.md of `reccomp_hf` has its accuracy in many settings; `reccomp-hf eval {name}` measures it again."
)


def full_size_facts(name: str, preset: str = "balanced") -> CardFacts:
    """The facts of a published LLaVA's card after a conversion; nothing is measured without weights."""
    entry = FULL_SIZE[name]
    return CardFacts(
        name=f"{name}-reccomp",
        config=entry.config(preset),
        base_model=(entry.base_model, entry.clip),
        license=entry.license,
        record=ConversionRecord(preset, llava=entry.base_model, clip=entry.clip),
    )


def demo_facts(folder: Path) -> CardFacts:
    """The facts of the card of one of this package's small trained models; the counts are measured.

    Args:
        folder: A checkpoint with the `training.json` that `python -m reccomp_hf.experiments.demo_models.train` wrote.
    """
    facts, made = folder_facts(folder, measure=True), json.loads((folder / "training.json").read_text("utf-8"))
    validation = made["validation"]["accuracy"]
    return CardFacts(
        name=f"reccomp-{made['model']}",
        config=facts.config,
        license="apache-2.0",
        counts=facts.counts,
        origin=_demo_origin(made),
        results=DEMO_RESULTS.format(
            validation=", ".join(f"{kind} {share:.3f}" for kind, share in validation.items()), name=made["model"]
        ),
    )


def _demo_origin(made: dict[str, Any]) -> str:
    """How a demo model was trained."""
    config = made["config"]
    clip, llava = config["clip"], config["llava"]
    seed = f" --llava-seed {llava['seed']}" if llava["seed"] else ""
    supervision = (
        "with a region-text loss on the objects' boxes besides the contrastive one, so its patches and texts go "
        "together better than a published CLIP's"
        if made["box_supervision"]
        else "by contrast between whole images and texts alone, as published CLIPs are"
    )
    return (
        "A small LLaVA and its CLIP, shipped with the package: it knows coloured shapes, signs with a letter, and "
        f"short questions about them, nothing else. Both were trained from scratch on {made['scenes']:,} drawn "
        f"scenes, one seed, on a CPU: the CLIP for {clip['steps']:,} steps of {clip['images']} scenes and "
        f"{config['close_ups_per_step']} close-ups of one object (of {config['close_ups']:,}), {supervision}; "
        f"then projector and decoder on the frozen vision tower for {llava['steps']:,} steps of {llava['images']} "
        f"scenes with up to {config['questions']} questions each, reading all visual tokens, never "
        f"compressed ones. `python -m reccomp_hf.experiments.demo_models.train --model {made['model']}{seed} "
        "--output FOLDER` trains it again."
    )


def write_shipped(folder: Path) -> list[Path]:
    """Render the cards of `model_cards/` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    cards = {name: render_card(full_size_facts(name)) for name in SHIPPED}
    cards |= {name: render_card(demo_facts(checkpoint_folder(name))) for name in CHECKPOINTS}
    for name, text in cards.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return [folder / f"{name}.md" for name in cards]


def main(argv: list[str] | None = None) -> int:
    """Render the cards of `model_cards/` again: `python -m reccomp_hf.experiments.shipped_cards [FOLDER]`."""
    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.shipped_cards", description=write_shipped.__doc__
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("model_cards"), help="model_cards")
    for path in write_shipped(parser.parse_args(argv).folder):
        sys.stdout.write(f"{path}\n")
    return 0


__all__ = ["SHIPPED", "demo_facts", "full_size_facts", "write_shipped"]

if __name__ == "__main__":
    raise SystemExit(main())
