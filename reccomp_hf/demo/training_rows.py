"""Rows of the demo's scenes for fine-tuning with TRL or transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .scene_questions import questions
from .scenes import draw_scene


class SceneQuestions(torch.utils.data.Dataset[dict[str, Any]]):
    """One question of each scene with its answer, as the rows that TRL's collator reads.

    Args:
        seeds: Seeds of the scenes, see `TRAIN_SEEDS`; a scene's seed also chooses which of its questions is asked.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = self.seeds[index]
        scene = draw_scene(seed)
        asked = questions(scene, seed)
        question = asked[int(np.random.default_rng([seed]).integers(len(asked)))]
        return {
            "images": [scene.image],
            "prompt": [{"role": "user", "content": question.text}],
            "completion": [{"role": "assistant", "content": question.answer}],
        }


__all__ = ["SceneQuestions"]
