"""A training loop that can be killed at any time and resumes from its last saved state."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .config import Stage
from .data import file_in_place

logger = logging.getLogger(__name__)

Figures: TypeAlias = dict[str, float]

SAVE_SECONDS = 150.0
"""Least time between two savings of the state."""

_REPORT_EVERY = 100  # steps
_GRADIENT_NORM = 1.0
_BETAS = (0.9, 0.98)


def run_stage(
    name: str,
    model: nn.Module,
    loss_of_step: Callable[[int], tuple[Tensor, Figures]],
    evaluate: Callable[[], Figures],
    stage: Stage,
    state_file: Path,
) -> list[Figures]:
    """Train a model in place, from its last saved state if there is one.

    Args:
        name: For the progress bar.
        model: The model; parameters that require a gradient are trained.
        loss_of_step: Gives the loss of a step and figures to report. It must depend on the number of the step and on
            the weights alone, so that a resumed run equals an uninterrupted one.
        evaluate: Gives figures to report on validation scenes.
        stage: Steps, rates and intervals.
        state_file: Where the state is kept, saved every `SAVE_SECONDS` and at the end.

    Returns:
        Everything that was reported, in order: "step" and figures.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    optimizer = _optimizer(model, stage)
    first, history = _load(state_file, model, optimizer)
    model.train()
    saved = reported = time.monotonic()
    window: list[Figures] = []
    bar = tqdm(
        range(first, stage.steps), name, initial=first, total=stage.steps, mininterval=1 if sys.stderr.isatty() else 30
    )
    with logging_redirect_tqdm():
        for step in bar:
            loss, figures = loss_of_step(step)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"The loss of {name} is {loss.item()} at step {step}. Lower learning_rate.")
            _update(model, optimizer, loss, learning_rate(stage, step))
            window.append(figures)
            done = step + 1
            if done % _REPORT_EVERY == 0:
                seconds = (time.monotonic() - reported) / len(window)
                means = {key: round(sum(row[key] for row in window) / len(window), 4) for key in figures}
                history.append({"step": done, **means})
                logger.info("%s step %d, %.3f s per step: %s", name, done, seconds, means)
                window, reported = [], time.monotonic()
            if done % stage.evaluate_every == 0 or done == stage.steps:
                model.eval()
                history.append({"step": done, **evaluate()})
                model.train()
                logger.info("%s step %d, validation: %s", name, done, history[-1])
            if time.monotonic() - saved >= SAVE_SECONDS or done == stage.steps:
                _save(state_file, done, model, optimizer, history)
                saved = time.monotonic()
    model.eval()
    return history


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then half a cosine towards zero at the horizon, cut short by a linear cool-down."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    past = max(0, step - stage.warmup_steps) / max(1, stage.horizon - stage.warmup_steps)
    cool = min(1.0, (stage.steps - step) / max(1, stage.cooldown_steps))
    return stage.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, past))) * cool


def _optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=_BETAS, fused=True)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _save(file: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Figures]) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    with file_in_place(file) as temporary:
        torch.save(state, temporary)


def _load(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[Figures]]:
    if not file.exists():
        return 0, []
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("resuming at step %d of %s", state["step"], file)
    return state["step"], state["history"]


__all__ = ["SAVE_SECONDS", "Figures", "learning_rate", "run_stage"]
