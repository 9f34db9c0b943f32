"""Small checkpoints that were really trained, and the pictures and questions to try them on, all without a network."""

from pathlib import Path

from .scenes import (
    COLORS,
    EVALUATION_SEEDS,
    IMAGE_SIZE,
    NUMBER_WORDS,
    QUESTION_KINDS,
    SHAPES,
    TRAIN_SEEDS,
    Question,
    Scene,
    SceneObject,
    draw_scene,
    questions,
)

CHECKPOINTS = ("clip", "llava", "clip_global_only")
"""Names that `checkpoint_folder` knows; `checkpoints/README.md` says what each one is."""


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a shipped checkpoint, ready for `from_pretrained`.

    Args:
        name: "llava" (a stock LLaVA with its processor), "clip" (the CLIP whose vision tower that LLaVA uses, with its
            tokenizer and image processor) or "clip_global_only" (a control: a CLIP trained on whole pictures only).

    Returns:
        An existing folder.

    Raises:
        ValueError: If there is no checkpoint of that name.
        FileNotFoundError: If the installed package lacks the checkpoint's files.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"There is no demo checkpoint {name!r}. Choose one of: {', '.join(CHECKPOINTS)}.")
    folder = Path(__file__).parent / "checkpoints" / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The files of the demo checkpoint {name!r} are missing: expected {folder / 'config.json'}. "
            "Reinstall reccomp-hf from a complete wheel or checkout."
        )
    return folder


__all__ = [
    "CHECKPOINTS",
    "COLORS",
    "EVALUATION_SEEDS",
    "IMAGE_SIZE",
    "NUMBER_WORDS",
    "QUESTION_KINDS",
    "SHAPES",
    "TRAIN_SEEDS",
    "Question",
    "Scene",
    "SceneObject",
    "checkpoint_folder",
    "draw_scene",
    "questions",
]
