"""Two small trained checkpoints, with images and questions to try them on, all without a network."""

from pathlib import Path

from .scene_questions import NUMBER_WORDS, QUESTION_KINDS, Question, questions
from .scenes import (
    COLORS,
    EVALUATION_SEEDS,
    IMAGE_SIZE,
    LETTERS,
    SHAPES,
    SIGN,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Scene,
    SceneObject,
    draw_scene,
)

CHECKPOINTS = ("demo", "demo-global")
"""Names that `checkpoint_folder` accepts; `checkpoints/README.md` describes the checkpoints."""


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a shipped checkpoint, ready for `from_pretrained`.

    Args:
        name: "demo" (its CLIP was trained with box supervision, so patches match texts well) or "demo-global" (its
            CLIP was trained on whole images and texts only, as published CLIPs are).

    Returns:
        An existing folder.

    Raises:
        ValueError: If the name is unknown.
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
    "LETTERS",
    "NUMBER_WORDS",
    "QUESTION_KINDS",
    "SHAPES",
    "SIGN",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Question",
    "Scene",
    "SceneObject",
    "checkpoint_folder",
    "draw_scene",
    "questions",
]
