"""The published table of speeds: prefills and whole answers, eager, as CUDA graphs, and with a static cache.

It is made of parts, the most important ones first. A part that fails leaves a line and the next one begins; what was
measured is handed on after every part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ...core.graphs import GraphCache
from ...data.progress import progress_bar
from .batches import Inputs, scene_batch
from .capacity import largest_batches
from .contenders import ORACLE, OURS, STOCK, Contender, oracle, ours, recordings, stock
from .counting import CPU_LAUNCHES, CUDA_LAUNCHES, launches
from .environment import environment
from .timing import Measures, Spread, Stopwatch, interleave

GRAPHED, STATIC = "CUDA graphs", "static cache"
OURS_GRAPHED, ORACLE_GRAPHED = f"{OURS}, {GRAPHED}", f"{ORACLE}, {GRAPHED}"
CONTENDERS = (STOCK, OURS, OURS_GRAPHED, ORACLE, ORACLE_GRAPHED)
RATIOS = ((STOCK, OURS), (STOCK, OURS_GRAPHED), (OURS, ORACLE), (OURS_GRAPHED, ORACLE_GRAPHED))
"""Pairs of contenders whose prefills are compared."""
SECONDS = 400.0
"""Parts that have not begun by then are left out of a report, so that it takes less than nine minutes."""
ROUNDS = 5
TABLES = ("prefills", "answers", "equal_answers", "launches", "choices", "largest_batches")

Build: TypeAlias = "Callable[[], tuple[Any, Callable[[int], Inputs]]]"
"""Makes a model and a function from a number of rows to its inputs."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its settings.

    Args:
        name: Name of the model, for tables.
        settings: Name of the settings, for tables.
        build: Makes the model and its inputs.
        fields: Fields of the config section.
    """

    name: str
    settings: str
    build: Build
    fields: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Model and settings."""
        return f"{self.name}, {self.settings}, {self.fields['budget']} tokens"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the report.

    Args:
        table: The one of `TABLES` that its rows belong to.
        title: Name of the part, for lines about parts that failed or were left out.
        build: Makes the model; successive parts with the same one share it.
        measure: Function from the model and its inputs to rows of the table, as JSON values.
    """

    table: str
    title: str
    build: Build
    measure: Callable[[Any, Callable[[int], Inputs]], list[dict[str, Any]]]


def speed_report(
    parts: Sequence[Part],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = SECONDS,
    write: Callable[[dict[str, Any]], Any] = lambda facts: None,
    begin: Callable[[str], Any] = lambda title: None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the parts one after the other, as long as time is left.

    Args:
        parts: The parts, the most important ones first.
        device: The device of the models.
        dtype: Dtype of their weights.
        seconds: Time after which no further part is begun.
        write: Called with the results so far after every part.
        begin: Called with the title of every part before it is measured.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Returns:
        JSON values: `"environment"`, `"launches_are"`, `"seconds"`, `"failed"` and `"left_out"`, lines about parts
        without results, and the rows of every table by its name.
    """
    began, built = time.monotonic(), _Built()
    facts: dict[str, Any] = {
        "environment": environment(device, dtype),
        "launches_are": CUDA_LAUNCHES if device.type == "cuda" else CPU_LAUNCHES,
        "seconds": 0.0,
        "failed": [],
        "left_out": [],
        **{table: [] for table in TABLES},
    }
    with progress_bar(len(parts), "parts", progress) as bar:
        for part in parts:
            if time.monotonic() - began > seconds:
                facts["left_out"].append(part.title)
            else:
                begin(part.title)
                try:
                    facts[part.table] += part.measure(*built.by(part.build))
                except Exception as error:  # whatever it is, the other parts are worth having
                    facts["failed"].append(f"{part.title}: {summary(error)}")
                _free()
            facts["seconds"] = time.monotonic() - began
            write(facts)
            bar.update()
    return facts


class _Built:
    """The model of a part, one at a time."""

    def __init__(self) -> None:
        self._build: Build | None = None
        self._made: tuple[Any, Callable[[int], Inputs]] | None = None

    def by(self, build: Build) -> tuple[Any, Callable[[int], Inputs]]:
        """Model and inputs of a function, which is called if they are not those of the part before."""
        if self._made is None or self._build is not build:
            self._build = self._made = None
            _free()
            self._build, self._made = build, build()
        return self._made


def summary(error: Exception) -> str:
    """Name and first line of an error."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


# ---- prefills ------------------------------------------------------------------------------------------------------


def prefills(case: Case, size: int, rounds: int = ROUNDS) -> Part:
    """The part that times the prefills of all contenders, in turns."""
    title = f"prefills of {case.title}, batch {size}"
    return Part("prefills", title, case.build, functools.partial(_prefills, case, size, rounds))


def _prefills(
    case: Case, size: int, rounds: int, model: Any, inputs_of: Callable[[int], Inputs]
) -> list[dict[str, Any]]:
    device, graphs, stopwatch = model.device, new_graphs(model.device), Stopwatch(model.device)
    running: dict[str, Contender] = {}
    first: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    inputs = inputs_of(size)
    for name in CONTENDERS:
        before = _reserved(device)
        try:
            contender = _contender(name, model, inputs, case.fields, graphs)
            seconds, _ = stopwatch.time(contender.prefill)
            contender.prefill()
        except Exception as error:
            failed[name] = summary(error)
        else:
            running[name], first[name] = contender, {"seconds": seconds, "bytes": _reserved(device) - before}
    turns = {name: _prefill_turn(one, stopwatch) for name, one in running.items()}
    interleave(turns, 1) if turns else None  # a contender's first call may change modules that another one records
    recorded = 0 if graphs is None else graphs.recorded
    times = interleave(turns, rounds) if turns else {}
    return [
        {
            "case": case.title,
            "batch_size": size,
            "prefill": {name: spreads["prefill"].to_dict() for name, spreads in times.items()},
            "ratios": {f"{one} / {other}": _ratio(times, one, other) for one, other in RATIOS},
            "first_prefill": first,
            "failed": failed,
            "graphs": 0 if graphs is None else len(graphs),
            "recorded_anew": 0 if graphs is None else graphs.recorded - recorded,
            "refusals": [] if graphs is None else graphs.refusals,
            "logits": _difference(running, failed),
        }
    ]


def _contender(
    name: str, model: Any, inputs: Inputs, fields: Mapping[str, Any], graphs: GraphCache | None
) -> Contender:
    if name == STOCK:
        return stock(model, inputs)
    make, given = (ours if name.startswith(OURS) else oracle), graphs if name.endswith(GRAPHED) else None
    return make(model, inputs, dict(fields), given)


def _prefill_turn(contender: Contender, stopwatch: Stopwatch) -> Callable[[], Measures]:
    return lambda: {"prefill": stopwatch.time(contender.prefill)[0]}


def _ratio(times: Mapping[str, Mapping[str, Spread]], one: str, other: str) -> dict[str, Any] | None:
    both = one in times and other in times
    return times[one]["prefill"].over(times[other]["prefill"]).to_dict() if both else None


def _difference(running: Mapping[str, Contender], failed: dict[str, str]) -> float | None:
    """Largest difference between the logits of ours with graphs and without, in standard deviations of the latter."""
    if not {OURS, OURS_GRAPHED} <= running.keys():
        return None
    try:
        eager, graphed = (running[name].prefill().logits.float() for name in (OURS, OURS_GRAPHED))
        return float((eager - graphed).abs().max() / eager.std())
    except RuntimeError as error:  # the times are worth having without it
        failed["logits"] = summary(error)
        return None


# ---- answers -------------------------------------------------------------------------------------------------------


def answers(case: Case, size: int, new_tokens: int, *, static: bool = False) -> Part:
    """The part that counts answers per second; `static`: those with a static cache, which a GPU compiles."""
    title = f"answers of {new_tokens} tokens{f' with a {STATIC}' if static else ''} by {case.title}, batch {size}"
    return Part("answers", title, case.build, functools.partial(_answers, case, size, new_tokens, static))


def _answers(
    case: Case, size: int, new_tokens: int, static: bool, model: Any, inputs_of: Callable[[int], Inputs]
) -> list[dict[str, Any]]:
    stopwatch, inputs, graphs = Stopwatch(model.device), inputs_of(size), new_graphs(model.device)
    rates: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, given, section, options in _ways(case.fields, graphs, static):
        answer = functools.partial(
            model.generate,
            **inputs,
            token_recovery=section,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **options,
        )
        try:
            with recordings(model, given):
                answer()  # compiles, records
                rates[name] = size / min(stopwatch.time(answer)[0] for _ in range(2))
        except Exception as error:
            failed[name] = summary(error)
    row = {"case": case.title, "batch_size": size, "new_tokens": new_tokens, "rates": rates, "failed": failed}
    return [row | {"refusals": [] if graphs is None else graphs.refusals}]


def _ways(
    fields: Mapping[str, Any], graphs: GraphCache | None, static: bool
) -> Iterator[tuple[str, GraphCache | None, dict[str, Any], dict[str, Any]]]:
    """Name, recordings, section and options of every way to generate an answer."""
    off, on = {"enabled": False}, dict(fields)
    if static:
        options = {"cache_implementation": "static"}
        yield f"{OURS_GRAPHED}, {STATIC}", graphs, on, options
        yield f"{STOCK}, {STATIC}", None, off, options
        return
    yield STOCK, None, off, {}
    yield OURS, None, on, {}
    yield OURS_GRAPHED, graphs, on, {}


def equal_answers(
    model: Any, processor: Any, fields: Mapping[str, Any], questions: int, batch_size: int = 25, new_tokens: int = 8
) -> dict[str, Any]:
    """Number of questions on drawn scenes whose ids by CUDA graphs equal the eager ones.

    Args:
        model: A compressed LLaVA in float32: in half precision kernels alone may move an answer.
        processor: The processor of the model.
        fields: Fields of the config section.
        questions: Number of questions.
        batch_size: Questions per batch.
        new_tokens: Tokens of an answer.
    """
    equal, graphs = 0, new_graphs(model.device)
    options = {"token_recovery": dict(fields), "do_sample": False, "max_new_tokens": new_tokens}
    for start in range(0, questions, batch_size):
        inputs = scene_batch(model, processor, min(batch_size, questions - start), seed=start)
        with recordings(model, None):
            eager = model.generate(**inputs, **options)
        with recordings(model, graphs):
            ids = model.generate(**inputs, **options)
        equal += int((ids == eager).all(-1).sum()) if ids.shape == eager.shape else 0
    return {"questions": questions, "equal": equal, "refusals": [] if graphs is None else graphs.refusals}


def equality(model: Any, processor: Any, fields: Mapping[str, Any], questions: int) -> Part:
    """The part that compares answers by CUDA graphs with eager ones, see [`equal_answers`]."""

    def measure(model: Any, inputs_of: Callable[[int], Inputs]) -> list[dict[str, Any]]:
        return [equal_answers(model, processor, fields, questions)]

    build = functools.partial(tuple, (model, functools.partial(scene_batch, model, processor)))
    return Part("equal_answers", f"equal answers to {questions} questions", build, measure)


# ---- launches, memory ----------------------------------------------------------------------------------------------


def launched(case: Case, size: int) -> Part:
    """The part that counts launches of all contenders; torch's profiler slows down what is timed after it."""
    title = f"launches of {case.title}, batch {size}"
    return Part("launches", title, case.build, functools.partial(_launches, case, size))


def _launches(case: Case, size: int, model: Any, inputs_of: Callable[[int], Inputs]) -> list[dict[str, Any]]:
    inputs, graphs, counts = inputs_of(size), new_graphs(model.device), {}
    for name in CONTENDERS:
        contender = _contender(name, model, inputs, case.fields, graphs)
        for _ in range(2):
            contender.prefill()
        counts[name] = launches(contender.prefill, model.device)
    return [{"case": case.title, "batch_size": size, "launches": counts}]


def largest(case: Case, new_tokens: int = 8) -> Part:
    """The part that searches the largest batch that a GPU holds, for the stock model and for ours."""

    def measure(model: Any, inputs_of: Callable[[int], Inputs]) -> list[dict[str, Any]]:
        budget = case.fields["budget"]
        found = largest_batches(model, inputs_of, budgets=[budget], new_tokens=new_tokens, progress=False)
        names = {STOCK: STOCK, f"{OURS} {budget}": OURS}
        return [{"case": case.title, **{names[name]: values for name, values in found.items()}}]

    return Part("largest_batches", f"largest batches of {case.title}", case.build, measure)


def new_graphs(device: torch.device) -> GraphCache | None:
    """A place for CUDA graphs; `None` without a GPU, where the same contenders run eagerly."""
    return GraphCache() if device.type == "cuda" else None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a GPU on which something failed may refuse everything
            torch.cuda.empty_cache()


def _reserved(device: torch.device) -> int:
    """Bytes that the allocator holds for tensors and graphs."""
    if device.type != "cuda":
        return 0
    _free()
    return torch.cuda.memory_reserved(device)


__all__ = [
    "CONTENDERS",
    "GRAPHED",
    "OURS_GRAPHED",
    "RATIOS",
    "SECONDS",
    "STATIC",
    "Case",
    "Part",
    "answers",
    "equal_answers",
    "equality",
    "largest",
    "launched",
    "prefills",
    "speed_report",
]
