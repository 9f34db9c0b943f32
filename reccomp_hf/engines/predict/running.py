"""Answers of a model to every question of a data file, from as many processes as there are."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...core import __version__
from ...core.configuration import TokenRecoveryConfig
from ...data.fingerprint import data_digest, images_digest, model_digest, processor_digest
from ...data.parts import Parts
from ...data.progress import progress_bar
from ...data.prompts import add_instruction, build_prompt, count_visual_tokens, encode_rows
from ...data.rows import Rows, existing_path, open_rows
from .batching import Batch, check_length, plan_batches, position_limit
from .defaults import DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS
from .processes import broadcast, process_state
from .questions import BadRow, Columns, OpenedQuestion, Questions, RowQuestion, json_line

T = TypeVar("T")
S = TypeVar("S")


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

    batches: list[tuple[Batch, Batch]]
    bad_rows: list[BadRow]

    @property
    def rows(self) -> int:
        return len(self.bad_rows) + sum(len(missing) for _, missing in self.batches)


@dataclasses.dataclass(frozen=True)
class _EncodedBatch:
    """A batch for the model.

    Attributes:
        opened: Questions whose images can be read.
        inputs: Tensors of these questions, `None` if there are none.
        bad_rows: The other rows.
    """

    opened: list[OpenedQuestion]
    inputs: Any
    bad_rows: list[BadRow]

    @property
    def questions(self) -> list[RowQuestion]:
        return [row.question for row in self.opened]


@dataclasses.dataclass(frozen=True)
class _Answerer:
    """A model with everything that its answers depend on."""

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
            "processor": processor_digest(self.processor),
            "reccomp_hf": __version__,
        }

    def encode(self, questions: Questions, batch: Batch) -> _EncodedBatch:
        opened, bad_rows = [], []
        for row in map(questions.open, batch):
            if isinstance(row, BadRow):
                bad_rows.append(row)
            else:
                opened.append(row)
        return _EncodedBatch(opened, self._encode(opened) if opened else None, bad_rows)

    def without_long_prompts(self, questions: Questions, batch: _EncodedBatch) -> _EncodedBatch:
        """A batch in which prompts that leave no position for an answer are bad rows.

        Called in the thread of the model, which counts the visual tokens of prompts that are too long without
        compression.
        """
        limit = position_limit(self.model)
        if batch.inputs is None or int(batch.inputs["attention_mask"].sum(-1).max()) < limit:
            return batch
        opened, bad_rows = [], list(batch.bad_rows)
        for row in batch.opened:
            try:
                check_length(self._prompt_positions(row, limit), limit)
            except ValueError as error:
                bad_rows.append(questions.bad_row(row.question.row, row.question.id, error))
            else:
                opened.append(row)
        return _EncodedBatch(opened, self._encode(opened) if opened else None, bad_rows)

    @torch.no_grad()
    def _prompt_positions(self, row: OpenedQuestion, limit: int) -> int:
        """Positions of a prompt once it is compressed."""
        inputs = self._encode([row]).to(self.model.device, self.model.dtype)
        length = inputs["input_ids"].shape[1]
        texts = length - int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        if length < limit or texts >= limit or not self._renumbers:
            return length
        short, _ = self.model.compress_inputs(**inputs, token_recovery=self.token_recovery)
        return int(short["input_ids"].shape[1])

    @property
    def _renumbers(self) -> bool:
        """Whether compression makes prompts take fewer positions."""
        return self.section.enabled and self.section.position_ids == "compact"

    def _encode(self, opened: list[OpenedQuestion]) -> Any:
        return encode_rows(
            self.processor,
            [row.images for row in opened],
            [add_instruction(row.question.text, self.instruction) for row in opened],
            [row.question.clip_texts for row in opened],
            self.section.rules,
        )

    @torch.no_grad()
    def answer(self, questions: list[RowQuestion], inputs: Any) -> dict[int, str]:
        """Lines of the output by row."""
        model = self.model
        inputs = inputs.to(model.device, model.dtype)
        options = {"do_sample": False, "max_new_tokens": self.max_new_tokens, "return_dict_in_generate": True}
        output = model.generate(**inputs, **options, token_recovery=self.token_recovery)
        prompt = inputs["input_ids"]
        ids = output.sequences[:, prompt.shape[1] :]
        uncompressed = (prompt == model.config.image_token_id).sum(-1).tolist()
        read = count_visual_tokens(output, [len(question.pictures) for question in questions], uncompressed)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        if self._renumbers:
            lengths = [length - cut + kept for length, cut, kept in zip(lengths, uncompressed, read, strict=True)]
        limit = position_limit(model)  # a row stops there, even though others of its batch are still answered
        within = [row[: limit - length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        answers = self.processor.batch_decode(within, skip_special_tokens=True)
        rows = zip(questions, answers, read, uncompressed, strict=True)
        return {question.row: _line(question, answer.strip(), *counts) for question, answer, *counts in rows}


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
    columns = Columns() if columns is None else columns
    rows = open_data(data, output, columns, limit, overwrite, batch_size, max_new_tokens)
    answerer = _Answerer(model, processor, instruction, max_new_tokens, dict(token_recovery or {}))
    section, parts = answerer.section, Parts(output)
    state, questions = process_state(), Questions(rows, columns, processor)

    def plan() -> _RemainingWork:
        settings = {"data": data_digest(data), "rows": len(questions), **dataclasses.asdict(columns)}
        images = {"images": images_digest(questions.pictures())}
        parts.prepare({**settings, **answerer.fingerprint(), **images}, overwrite)
        if parts.finished:
            return _RemainingWork([], [])
        done = parts.lines().keys()
        planned = plan_batches(questions, model, section, processor, batch_size)
        # A batch that lacks a row is read as a whole, so that its answers are the same in half precision too.
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
    state: Any, answerer: _Answerer, questions: Questions, parts: Parts, work: _RemainingWork, progress: bool | None
) -> None:
    """Answer this process's share of the work."""
    share = work.batches[state.process_index :: state.num_processes]
    process = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    rows = sum(len(missing) for _, missing in share)
    bar = progress_bar(rows, f"rows{process}", progress if state.is_main_process else False)
    with bar, parts.writer(state.process_index) as write:
        for (_, missing), batch in _prefetch(share, lambda entry: answerer.encode(questions, entry[0])):
            batch = answerer.without_long_prompts(questions, batch)
            lines = {bad_row.row: bad_row.line for bad_row in batch.bad_rows}
            if batch.questions:
                lines |= answerer.answer(batch.questions, batch.inputs)
            write(lines[row] for row in missing)
            bar.update(len(missing))
        if state.is_main_process:  # last, so that a run that fails at once has written nothing
            write(bad_row.line for bad_row in work.bad_rows)


def _prefetch(items: Iterable[T], prepare: Callable[[T], S]) -> Iterator[tuple[T, S]]:
    """Items with their prepared values; the next one is prepared while the caller works on the current one."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[T, Any]] = []
        for item in items:
            waiting.append((item, pool.submit(prepare, item)))
            if len(waiting) > 1:
                ready, future = waiting.pop(0)
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _line(question: RowQuestion, answer: str, read: int, uncompressed: int) -> str:
    paths = [picture.path for picture in question.pictures]
    return json_line(
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


__all__ = ["Prediction", "open_data", "predict"]
