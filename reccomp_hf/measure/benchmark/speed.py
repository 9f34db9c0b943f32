"""The published table of speeds: prefills and whole answers, eager, as CUDA graphs, and with a static cache."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...core.graphs import GraphCache
from ...data.progress import progress_bar
from .batches import Inputs, noise_batch, scene_batch
from .contenders import ORACLE, OURS, STOCK, Contender, oracle, ours, recordings, stock
from .counting import CPU_LAUNCHES, CUDA_LAUNCHES, launches
from .environment import environment
from .models import named_config, random_model
from .timing import Measures, Spread, Stopwatch, interleave

GRAPHED, STATIC = "CUDA graphs", "static cache"
OURS_GRAPHED, ORACLE_GRAPHED = f"{OURS}, {GRAPHED}", f"{ORACLE}, {GRAPHED}"
CONTENDERS = (STOCK, OURS, OURS_GRAPHED, ORACLE, ORACLE_GRAPHED)
RATIOS = ((STOCK, OURS), (STOCK, OURS_GRAPHED), (OURS, ORACLE), (OURS_GRAPHED, ORACLE_GRAPHED))
"""Pairs of contenders whose prefills are compared."""
SECONDS = 420.0
"""Batches that have not begun by then are left out of a report, so that it takes less than nine minutes."""

_CPU_QUESTIONS, _GPU_QUESTIONS = 4, 500  # whose answers by CUDA graphs are compared with the eager ones


@dataclasses.dataclass(frozen=True)
class Case:
    """A part of the table.

    Args:
        name: Name of the model, for the heading.
        settings: Name of the settings, for the heading.
        build: Function that makes the model and a function from a number of rows to its inputs.
        fields: Fields of the config section.
        batch_sizes: Rows per batch.
        answers: Batch sizes among them of which whole answers are timed.
        static: Batch sizes among these of which answers with a static cache are timed: a GPU compiles each shape.
    """

    name: str
    settings: str
    build: Callable[[], tuple[Any, Callable[[int], Inputs]]]
    fields: Mapping[str, Any]
    batch_sizes: Sequence[int]
    answers: Sequence[int] = ()
    static: Sequence[int] = ()

    @property
    def title(self) -> str:
        """Model and settings."""
        return f"{self.name}, {self.settings}, {self.fields['budget']} tokens"


def speed_report(
    cases: Sequence[Case],
    *,
    new_tokens: Sequence[int] = (8, 128),
    rounds: int = 5,
    seconds: float = SECONDS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the cases one after the other, as long as time is left.

    Args:
        cases: The parts of the table; successive ones with the same `build` share a model.
        new_tokens: Tokens of the answers, none of which ends earlier.
        rounds: Timed turns of each contender.
        seconds: Time after which no further batch size is begun.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Returns:
        JSON values: `"environment"`, `"new_tokens"`, `"rounds"`, `"launches_are"`, `"seconds"`, `"left_out"` and
        `"rows"`, one per case and batch size.
    """
    began, rows, left_out, built = time.monotonic(), [], [], None
    facts: dict[str, Any] = {"new_tokens": list(new_tokens), "rounds": rounds}
    with progress_bar(sum(len(case.batch_sizes) for case in cases), "batches", progress) as bar:
        for case in cases:
            for size in case.batch_sizes:
                if time.monotonic() - began > seconds:
                    left_out.append(f"{case.title}, batch {size}")
                else:
                    if built is None or built[0] is not case.build:
                        built = None  # one model at a time
                        built = (case.build, *case.build())
                    _, model, inputs_of = built
                    rows.append(
                        {"case": case.title, **_measure(model, inputs_of(size), case, size, new_tokens, rounds)}
                    )
                    facts |= _machine(model)
                bar.update()
    return {**facts, "seconds": time.monotonic() - began, "left_out": left_out, "rows": rows}


def published_report(model: Any, processor: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The published table: random weights of full size on a GPU, a small shipped model on a CPU.

    Args:
        model: The shipped model in float32; its device decides.
        processor: The processor of the model.
        dtype: Weights of the models of full size.

    Returns:
        As [`speed_report`], and `"equal_answers"`, see [`equal_answers`].
    """
    device, fields = model.device, {"budget": 16}
    on_gpu = device.type == "cuda"
    same = equal_answers(model, processor, fields, _GPU_QUESTIONS if on_gpu else _CPU_QUESTIONS)
    if on_gpu:
        return {**speed_report(published_cases(device, dtype)), "equal_answers": same}
    build = functools.partial(tuple, (model, functools.partial(scene_batch, model, processor)))
    case = Case("demo", "balanced", build, fields, (1, 2), (1, 2), (1,))
    return {**speed_report([case], new_tokens=(2, 4), rounds=2), "equal_answers": same}


def published_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The cases of the published table: random weights of full size, on a GPU."""

    @functools.cache
    def build(name: str) -> Callable[[], tuple[Any, Callable[[int], Inputs]]]:
        def model_and_inputs() -> tuple[Any, Callable[[int], Inputs]]:
            model = random_model(named_config(name, "balanced"), device, dtype)
            return model, functools.partial(noise_batch, model)

        return model_and_inputs

    paper, balanced = (_preset_fields(preset) for preset in ("paper", "balanced"))
    seven, thirteen, tiled = (build(name) for name in ("llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-vicuna-7b"))
    return [
        Case("LLaVA-1.5-7B", "balanced", seven, {**balanced, "budget": 64}, (1, 8, 32), (1, 8, 32), (1,)),
        Case("LLaVA-1.5-7B", "paper", seven, {**paper, "budget": 64}, (1, 8, 32)),
        Case("LLaVA-NeXT-7B", "balanced", tiled, {**balanced, "budget": 160}, (1, 8)),
        Case("LLaVA-1.5-13B", "balanced", thirteen, {**balanced, "budget": 64}, (1, 8)),
    ]


def _preset_fields(preset: str) -> dict[str, Any]:
    fields = named_config("llava-1.5-7b", preset).token_recovery.to_dict()
    return {name: value for name, value in fields.items() if name not in ("version", "text_encoder_config")}


def equal_answers(
    model: Any, processor: Any, fields: Mapping[str, Any], questions: int, batch_size: int = 25, new_tokens: int = 8
) -> dict[str, int]:
    """Number of questions on drawn scenes whose ids by CUDA graphs equal the eager ones.

    Args:
        model: A compressed LLaVA in float32: in half precision kernels alone may move an answer.
        processor: The processor of the model.
        fields: Fields of the config section.
        questions: Number of questions.
        batch_size: Questions per batch.
        new_tokens: Tokens of an answer.
    """
    equal, graphs = 0, _graphs(model.device)
    options = {"token_recovery": dict(fields), "do_sample": False, "max_new_tokens": new_tokens}
    for start in range(0, questions, batch_size):
        inputs = scene_batch(model, processor, min(batch_size, questions - start), seed=start)
        with recordings(model, None):
            eager = model.generate(**inputs, **options)
        with recordings(model, graphs):
            ids = model.generate(**inputs, **options)
        equal += int((ids == eager).all(-1).sum()) if ids.shape == eager.shape else 0
    return {"questions": questions, "equal": equal}


def _measure(
    model: Any, inputs: Inputs, case: Case, size: int, new_tokens: Sequence[int], rounds: int
) -> dict[str, Any]:
    """One batch size of a case."""
    device, fields, graphs = model.device, dict(case.fields), _graphs(model.device)
    made = (
        stock(model, inputs),
        *(make(model, inputs, fields, kept) for make in (ours, oracle) for kept in (None, graphs)),
    )
    stopwatch, running, recording = Stopwatch(device), {}, {}
    for name, contender in zip(CONTENDERS, made, strict=True):
        before = _reserved(device)
        try:
            seconds, _ = stopwatch.time(contender.prefill)
        except torch.cuda.OutOfMemoryError:
            continue
        running[name], recording[name] = contender, {"seconds": seconds, "bytes": _reserved(device) - before}
    times = interleave({name: _prefill_turn(one, stopwatch) for name, one in running.items()}, rounds)
    prefill = {
        name: {**times[name]["prefill"].to_dict(), "launches": launches(running[name].prefill, device)}
        for name in running
    }
    return {
        "batch_size": size,
        "prefill": prefill,
        "ratios": {f"{one} / {other}": _ratio(times, one, other) for one, other in RATIOS},
        "first_prefill": recording,
        "graphs": len(graphs or ()),
        "answers": _answers(model, inputs, case, size, new_tokens, graphs) if size in case.answers else {},
    }


def _prefill_turn(contender: Contender, stopwatch: Stopwatch) -> Callable[[], Measures]:
    return lambda: {"prefill": stopwatch.time(contender.prefill)[0]}


def _ratio(times: Mapping[str, Mapping[str, Spread]], one: str, other: str) -> dict[str, Any] | None:
    both = one in times and other in times
    return times[one]["prefill"].over(times[other]["prefill"]).to_dict() if both else None


def _answers(
    model: Any, inputs: Inputs, case: Case, size: int, new_tokens: Sequence[int], graphs: GraphCache | None
) -> dict[str, dict[str, float | None]]:
    """Answers per second by number of new tokens and contender; `None` where memory did not suffice."""
    stopwatch = Stopwatch(model.device)
    found: dict[str, dict[str, float | None]] = {}
    for count in new_tokens:
        found[str(count)] = {}
        for name, given, section, options in _ways(case, size, graphs):
            try:
                with recordings(model, given):
                    answer = functools.partial(
                        model.generate,
                        **inputs,
                        token_recovery=section,
                        do_sample=False,
                        min_new_tokens=count,
                        max_new_tokens=count,
                        **options,
                    )
                    answer()  # compiles, records
                    best = min(stopwatch.time(answer)[0] for _ in range(2))
                found[str(count)][name] = size / best
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                found[str(count)][name] = None
    return found


def _ways(
    case: Case, size: int, graphs: GraphCache | None
) -> Iterator[tuple[str, GraphCache | None, dict[str, Any], dict[str, Any]]]:
    """Name, recordings, section and options of every way to generate an answer."""
    off, on, static = {"enabled": False}, dict(case.fields), {"cache_implementation": "static"}
    yield STOCK, None, off, {}
    yield OURS, None, on, {}
    yield OURS_GRAPHED, graphs, on, {}
    if size in case.static:
        yield f"{STOCK}, {STATIC}", None, off, static
        yield f"{OURS_GRAPHED}, {STATIC}", graphs, on, static


def _graphs(device: torch.device) -> GraphCache | None:
    """A place for CUDA graphs; `None` without a GPU, where the same contenders run eagerly."""
    return GraphCache() if device.type == "cuda" else None


def _machine(model: Any) -> dict[str, Any]:
    cuda = model.device.type == "cuda"
    return {
        "environment": environment(model.device, model.dtype),
        "launches_are": CUDA_LAUNCHES if cuda else CPU_LAUNCHES,
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reserved(device: torch.device) -> int:
    """Bytes that the allocator holds for tensors and graphs."""
    _free()
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


__all__ = [
    "CONTENDERS",
    "GRAPHED",
    "OURS_GRAPHED",
    "RATIOS",
    "SECONDS",
    "STATIC",
    "Case",
    "equal_answers",
    "published_cases",
    "published_report",
    "speed_report",
]
