"""Answers of a model to every question of a data file, from as many processes as there are."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.fingerprint import data_digest, images_digest
from ...data.parts import Parts
from ...data.progress import progress_bar
from ...data.rows import Rows, existing_path, open_rows
from .answering import Answerer, ModelAnswerer, Share
from .batching import plan_batches
from .defaults import DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS
from .processes import broadcast, process_state
from .questions import BadRow, Columns, Questions


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Summary of a run.

    Attributes:
        output: The file with the answers.
        rows: Lines of the file.
        answers: Lines with an answer.
        errors: Lines with an error instead.
        new: Rows of this run; the others were there from runs that were stopped.
        visual_tokens: Mean over the answers, newlines of LLaVA-NeXT included; `None` without answers.
        uncompressed_visual_tokens: The same for the stock model.
        processes: Number of processes of this run.
        seconds: From the first batch to the last, in the slowest process.
        rows_per_second: New rows per second.
    """

    output: str
    rows: int
    answers: int
    errors: int
    new: int
    visual_tokens: float | None
    uncompressed_visual_tokens: float | None
    processes: int
    seconds: float
    rows_per_second: float


@dataclasses.dataclass(frozen=True)
class _RemainingWork:
    """The rows that have no line in the output yet.

    Attributes:
        batches: Rows that are read together, each batch with those of its rows that have no line.
        bad_rows: Rows without a line that cannot be asked.
    """

    batches: list[Share]
    bad_rows: list[BadRow]

    @property
    def rows(self) -> int:
        return len(self.bad_rows) + sum(len(missing) for _, missing in self.batches)


def predict(
    model: Any,
    processor: Any,
    data: str | Path,
    output: str | Path,
    *,
    columns: Columns | None = None,
    instruction: str = "",
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    token_recovery: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Prediction:
    """Ask a compressed model every question of a file or folder, greedily, and write a line of JSON for each.

    A line has `row` (the row's number from 0), `id`, `image` (the path or paths in the data), `question`, `answer`,
    `visual_tokens` and `uncompressed_visual_tokens`; or `row`, `id` and `error` for a row that cannot be asked, for
    example because its prompt leaves no position for an answer (an answer ends at the model's last position). Lines
    are in the order of the data. Rows are read in batches of similar length; a row's answer does not depend on its
    batch (in float32; in half precision, rounding does).

    Called in several processes that accelerate launched, each answers its share. Answers are kept in `OUTPUT.parts`
    until the output is complete, and the same call after a kill resumes from it, in any number of processes and with
    any batch size. It must be the same in everything that the answers depend on, the image files and the package's
    version included.

    Args:
        model: A compressed LLaVA, in eval mode, on this process's device.
        processor: The processor of the model.
        data: See [`open_rows`].
        output: The file to write.
        columns: Columns of the data.
        instruction: Appended to each question in the prompt (not in the text that CLIP reads), on a line of its own.
        limit: Read the first `limit` rows only.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer.
        token_recovery: Fields of the config section to override.
        overwrite: Start over: remove the output, finished or not.
        progress: Show a progress bar; by default only where stderr is a terminal.

    Returns:
        The summary of the run, the same in every process.

    Raises:
        FileExistsError: The output is finished.
        ValueError: Data or settings that are not valid, or an output that was begun with others.
        OSError: Data that cannot be read.
    """
    answerer = ModelAnswerer(model, processor, instruction, max_new_tokens, dict(token_recovery or {}))
    return predict_by(
        answerer,
        data,
        output,
        columns=columns,
        limit=limit,
        batch_size=batch_size,
        overwrite=overwrite,
        progress=progress,
    )


def predict_by(
    answerer: Answerer,
    data: str | Path,
    output: str | Path,
    *,
    columns: Columns | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Prediction:
    """As [`predict`], by any engine."""
    columns = Columns() if columns is None else columns
    rows = open_data(data, output, columns, limit, overwrite, batch_size, answerer.max_new_tokens)
    section, parts = answerer.section, Parts(output)
    state, questions = process_state(), Questions(rows, columns, answerer.processor)

    def plan() -> _RemainingWork:
        settings = {"data": data_digest(data), "rows": len(questions), **dataclasses.asdict(columns)}
        images = {"images": images_digest(questions.pictures())}
        parts.prepare({**settings, **answerer.fingerprint(), **images}, overwrite)
        if parts.finished:
            return _RemainingWork([], [])
        done = parts.lines().keys()
        planned = plan_batches(questions, answerer.config, section, answerer.processor, batch_size)
        batches = [(batch, [row for row in batch if row not in done]) for batch in planned.batches]
        return _RemainingWork(
            [(batch, missing) for batch, missing in batches if missing],
            [bad_row for bad_row in planned.bad_rows if bad_row.row not in done],
        )

    work = broadcast(state, plan)
    began = time.perf_counter()
    if work.rows:
        _answer(state, answerer, questions, parts, work, progress)
    state.wait_for_everyone()
    seconds = time.perf_counter() - began
    return broadcast(state, lambda: _summary(parts, len(questions), work.rows, state.num_processes, seconds))


def open_data(
    data: str | Path,
    output: str | Path,
    columns: Columns,
    limit: int | None = None,
    overwrite: bool = False,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
) -> Rows:
    """Open the data, and refuse arguments of [`predict`] that are not valid, before a model is loaded for them.

    Raises:
        FileExistsError: The output is finished.
        ValueError: An argument that is not valid, no rows, or a column that is missing.
        OSError: Data that cannot be read.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    source, target = existing_path(data).resolve(), Path(output).resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{output} must be a file in a folder that exists.")
    if source == target:
        raise ValueError(f"{output} is the data itself, which would be overwritten: name another file to write.")
    if source in target.parents:
        raise ValueError(f"{output} is inside the folder of the data: name a file elsewhere.")
    Parts(output).check_output(overwrite)
    with process_state().main_process_first():  # the first process fills the cache of `datasets`
        rows = open_rows(data, limit)
    columns.require(rows)
    return rows


def _answer(
    state: Any, answerer: Answerer, questions: Questions, parts: Parts, work: _RemainingWork, progress: bool | None
) -> None:
    """Answer this process's share of the work."""
    share = work.batches[state.process_index :: state.num_processes]
    process = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    rows = sum(len(missing) for _, missing in share)
    bar = progress_bar(rows, f"rows{process}", progress if state.is_main_process else False)
    with bar, parts.writer(state.process_index) as write:
        for lines in answerer.answers(questions, share):
            write(lines.values())
            bar.update(len(lines))
        if state.is_main_process:  # last, so that a run that fails at once has written nothing
            write(bad_row.line for bad_row in work.bad_rows)


def _summary(parts: Parts, rows: int, new: int, processes: int, seconds: float) -> Prediction:
    """Put the output together and count its lines."""
    lines = [json.loads(line) for line in parts.join(rows)]
    answers = [line for line in lines if "error" not in line]

    def mean(name: str) -> float | None:
        return sum(line[name] for line in answers) / len(answers) if answers else None

    return Prediction(
        output=str(parts.output),
        rows=len(lines),
        answers=len(answers),
        errors=len(lines) - len(answers),
        new=new,
        visual_tokens=mean("visual_tokens"),
        uncompressed_visual_tokens=mean("uncompressed_visual_tokens"),
        processes=processes,
        seconds=seconds,
        rows_per_second=new / seconds if new else 0.0,
    )


__all__ = ["Prediction", "open_data", "predict", "predict_by"]
