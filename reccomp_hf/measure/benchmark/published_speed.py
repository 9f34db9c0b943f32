"""The parts of the published table of speeds: random weights of full size on a GPU, a shipped model on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...core.configuration import TokenRecoveryConfig
from .batches import Inputs, noise_batch, scene_batch
from .choice_speed import choice_settings
from .models import named_config, random_model
from .speed import Case, Part, answers, choices, equality, largest, launched, prefills

_BUDGET_OF_DEMO, _CPU_QUESTIONS, _GPU_QUESTIONS = 16, 4, 500  # questions whose answers by CUDA graphs are compared


def published_parts(model: Any, processor: Any, dtype: torch.dtype) -> list[Part]:
    """The parts of the published table.

    Args:
        model: The shipped model in float32; its device decides.
        processor: The processor of the model.
        dtype: Weights of the models of full size.
    """
    device, fields = model.device, {"budget": _BUDGET_OF_DEMO}
    if device.type == "cuda":
        return gpu_parts(equality(model, processor, fields, _GPU_QUESTIONS), device, dtype)
    build = functools.partial(tuple, (model, functools.partial(scene_batch, model, processor)))
    case = Case("demo", "balanced", build, fields)
    return [
        *(prefills(case, size, rounds=2) for size in (1, 2)),
        choices(choice_settings(), (1,), device, dtype),
        equality(model, processor, fields, _CPU_QUESTIONS),
        *(answers(case, size, count) for size in (1, 2) for count in (2, 4)),
        answers(case, 1, 4, static=True),
        launched(case, 1),
    ]


def gpu_parts(equal: Part, device: torch.device, dtype: torch.dtype) -> list[Part]:
    """The parts for a GPU, with one that compares answers; successive parts share a model."""
    paper, balanced = (TokenRecoveryConfig.from_preset(preset).overridable() for preset in ("paper", "balanced"))
    seven, thirteen, tiled = (
        _build(name, device, dtype) for name in ("llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-vicuna-7b")
    )
    main = Case("LLaVA-1.5-7B", "balanced", seven, {**balanced, "budget": 64})
    as_published = Case("LLaVA-1.5-7B", "paper", seven, {**paper, "budget": 64})
    of_tiles = Case("LLaVA-NeXT-7B", "balanced", tiled, {**balanced, "budget": 160})
    larger = Case("LLaVA-1.5-13B", "balanced", thirteen, {**balanced, "budget": 64})
    return [
        *(prefills(main, size) for size in (1, 8, 32)),
        *(prefills(as_published, size) for size in (1, 8, 32)),
        *(answers(main, size, 8) for size in (1, 8, 32)),
        choices(choice_settings(), (1, 8, 32), device, dtype),
        equal,
        *(prefills(of_tiles, size) for size in (1, 8)),
        *(prefills(larger, size) for size in (1, 8)),
        *(answers(main, size, 128) for size in (1, 8, 32)),
        answers(main, 1, 128, static=True),
        launched(main, 1),
        largest(main),
    ]


def _build(name: str, device: torch.device, dtype: torch.dtype) -> Callable[[], tuple[Any, Callable[[int], Inputs]]]:
    def model_and_inputs() -> tuple[Any, Callable[[int], Inputs]]:
        model = random_model(named_config(name, "balanced"), device, dtype)
        return model, functools.partial(noise_batch, model)

    return model_and_inputs


__all__ = ["gpu_parts", "published_parts"]
