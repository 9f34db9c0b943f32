"""Asking a model every question of a data file, in as many processes as there are."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...core.configuration import TokenRecoveryConfig
from ...data.progress import progress_bar
from ...data.prompts import add_instruction, build_prompt, count_visual_tokens, encode_rows
from ...data.rows import Rows, open_rows
from .fingerprint import data_digest, model_digest
from .parts import Parts
from .questions import Batch, Columns, Question, Questions, batches, line_of, opened

DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS = 16, 64

_PATIENCE = datetime.timedelta(days=30)  # how long a process waits for the others; the launcher ends it if one fails

T = TypeVar("T")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run did.

    Attributes:
        output: The file.
        rows: Its lines.
        answers: Those that hold an answer.
        errors: Those that hold an error instead.
        new: Rows of this run; the others were there from runs that were stopped.
        visual_tokens: Mean over the answers, newlines of LLaVA-NeXT included; `None` without answers.
        uncompressed_visual_tokens: What the stock model would have read.
        processes: Of this run.
        seconds: From the first batch to the last, in the slowest process.
        rows_per_second: New rows.
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
class _Plan:
    """What is left to do.

    Attributes:
        batches: Rows that are read together, and those of them that have no line yet.
        errors: Lines of rows that cannot be asked, where they have none yet.
    """

    batches: list[tuple[Batch, Batch]]
    errors: list[str]

    @property
    def new(self) -> int:
        return len(self.errors) + sum(len(fresh) for _, fresh in self.batches)


@dataclasses.dataclass(frozen=True)
class _Asker:
    """A model with all that its answers depend on."""

    model: Any
    processor: Any
    instruction: str
    max_new_tokens: int
    token_recovery: Mapping[str, Any]

    @property
    def section(self) -> TokenRecoveryConfig:
        return self.model.config.token_recovery.replace(self.token_recovery)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "instruction": self.instruction,
            "max_new_tokens": self.max_new_tokens,
            "prompt": build_prompt(self.processor, "?", 1),
            **{f"token_recovery.{name}": value for name, value in self.section.overridable().items()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "model": model_digest(self.model),
        }

    def encode(self, questions: Questions, batch: Batch) -> tuple[list[Question], Any, dict[int, str]]:
        """Questions of a batch whose pictures can be read, their tensors, and the lines of the other rows."""
        asked, pictures, wrong = opened(questions, batch)
        if not asked:
            return asked, None, wrong
        texts = [add_instruction(question.text, self.instruction) for question in asked]
        return asked, encode_rows(self.processor, pictures, texts, [question.reads for question in asked]), wrong

    @torch.no_grad()
    def answer(self, asked: list[Question], inputs: Any) -> dict[int, str]:
        """Lines by row."""
        model = self.model
        inputs = inputs.to(model.device, model.dtype)
        options = {"do_sample": False, "max_new_tokens": self.max_new_tokens, "return_dict_in_generate": True}
        output = model.generate(**inputs, **options, token_recovery=self.token_recovery)
        prompt = inputs["input_ids"]
        ids = output.sequences[:, prompt.shape[1] :]
        uncompressed = (prompt == model.config.image_token_id).sum(-1).tolist()
        read = count_visual_tokens(output, [len(question.pictures) for question in asked], uncompressed)
        answers = self.processor.batch_decode(ids, skip_special_tokens=True)
        told = zip(asked, answers, read, uncompressed, strict=True)
        return {question.row: _line(question, answer.strip(), *counts) for question, answer, *counts in told}


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

    A line holds `row` (its number from 0), `id`, `image` (the path, or several, as the data has it), `question`,
    `answer`, `visual_tokens` and `uncompressed_visual_tokens`; or `row`, `id` and `error` where a row cannot be asked.
    Lines are in the order of the data. Rows are read in batches of similar length; a row's answer does not depend on
    its batch (in float32; in half precision rounding does).

    Called in several processes that accelerate knows of, each answers its share. What is answered is kept in
    `OUTPUT.parts` until all of it is there, and the same call after a kill goes on from it, in any number of processes
    and with any batch size.

    Args:
        model: A compressed LLaVA, in eval mode, on this process's device.
        processor: Its processor.
        data: See [`open_rows`].
        output: The file to write.
        columns: Where in a row things are.
        instruction: Appended to each question in the prompt (not in what CLIP reads), on a line of its own.
        limit: The first so many rows.
        batch_size: Questions read at once.
        max_new_tokens: Longest answer.
        token_recovery: Fields of the config section to override.
        overwrite: Start over: remove the output, finished or begun.
        progress: Show a progress bar; `None` where stderr is a terminal.

    Returns:
        What was done, the same in every process.

    Raises:
        FileExistsError: The output is finished.
        ValueError: Data or settings that cannot be, or an output that was begun with others.
        OSError: Data that cannot be read.
    """
    columns = Columns() if columns is None else columns
    rows = checked_rows(data, output, columns, limit, overwrite, batch_size, max_new_tokens)
    asker = _Asker(model, processor, instruction, max_new_tokens, dict(token_recovery or {}))
    section, parts = asker.section, Parts(output)
    state, questions = process_state(), Questions(rows, columns, processor)

    def plan() -> _Plan:
        about = {"data": data_digest(data), "rows": len(questions), **dataclasses.asdict(columns)}
        parts.prepare({**about, **asker.fingerprint()}, overwrite)
        if parts.finished:
            return _Plan([], [])
        done = parts.lines().keys()
        planned, wrong = batches(questions, model, section, processor, batch_size)
        # A batch that lacks a row is read as it was, so that in half precision too its answers are the same.
        left = [(batch, [row for row in batch if row not in done]) for batch in planned]
        return _Plan([entry for entry in left if entry[1]], [line for row, line in wrong.items() if row not in done])

    todo = _agreed(state, plan)
    began = time.perf_counter()
    if todo.new:
        _answer(state, asker, questions, parts, todo, progress)
    state.wait_for_everyone()
    seconds = time.perf_counter() - began
    return _agreed(state, lambda: _summary(parts, len(questions), todo.new, state.num_processes, seconds))


def process_state(device: str | None = None) -> Any:
    """This process among those that were launched together, as accelerate tells it; the first call decides.

    Args:
        device: `"cpu"`, or anything else for GPUs; by default those if there are any. It says how processes talk.
    """
    from accelerate import PartialState

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return PartialState(device == "cpu", timeout=_PATIENCE)


def checked_rows(
    data: str | Path,
    output: str | Path,
    columns: Columns,
    limit: int | None = None,
    overwrite: bool = False,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
) -> Rows:
    """Open the data, and refuse arguments of [`predict`] that cannot be, before a model is loaded for them.

    Raises:
        FileExistsError: The output is finished.
        ValueError: An argument that cannot be, no rows, or a column that is missing.
        OSError: Data that cannot be read.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    source, target = Path(data).resolve(), Path(output).resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{output} must be a file in a folder that exists.")
    if source == target:
        raise ValueError(f"{output} is what is read, and would be written over: name another file to write.")
    if source in target.parents:
        raise ValueError(f"{output} is inside the folder that is read: name a file elsewhere.")
    Parts(output).check_output(overwrite)
    with process_state().main_process_first():  # who is first fills the cache of `datasets`
        rows = open_rows(data, limit)
    columns.require(rows)
    return rows


def _answer(state: Any, asker: _Asker, questions: Questions, parts: Parts, todo: _Plan, progress: bool | None) -> None:
    """Answer this process's share."""
    share = todo.batches[state.process_index :: state.num_processes]
    others = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    bar = progress_bar(
        sum(len(fresh) for _, fresh in share), f"rows{others}", progress if state.is_main_process else False
    )
    with bar, parts.writer(state.process_index) as write:
        for (_, fresh), (asked, inputs, lines) in _ahead(share, lambda entry: asker.encode(questions, entry[0])):
            lines = {**lines, **(asker.answer(asked, inputs) if asked else {})}
            write(lines[row] for row in fresh)
            bar.update(len(fresh))
        if state.is_main_process:  # last, so that a run that fails at once has written nothing
            write(todo.errors)


def _ahead(items: Iterable[T], prepare: Callable[[T], S]) -> Iterator[tuple[T, S]]:
    """Items with what is prepared of them, the next one while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[T, Any]] = []
        for item in items:
            waiting.append((item, pool.submit(prepare, item)))
            if len(waiting) > 1:
                ready, future = waiting.pop(0)
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _agreed(state: Any, find: Callable[[], T]) -> T:
    """What the main process finds, in every process; an error too."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = find()
        except (ValueError, OSError, RuntimeError) as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _line(question: Question, answer: str, read: int, uncompressed: int) -> str:
    paths = [picture.path for picture in question.pictures]
    return line_of(
        {
            "row": question.row,
            "id": question.id,
            "image": paths[0] if len(paths) == 1 else paths,
            "question": question.text,
            "answer": answer,
            "visual_tokens": read,
            "uncompressed_visual_tokens": uncompressed,
        }
    )


def _summary(parts: Parts, count: int, new: int, processes: int, seconds: float) -> Prediction:
    """Put the output together, and say what is in it."""
    lines = [json.loads(line) for line in parts.join(count)]
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


__all__ = ["DEFAULT_BATCH_SIZE", "DEFAULT_NEW_TOKENS", "Prediction", "checked_rows", "predict", "process_state"]
