"""Engines that answer the questions of a run: a model of transformers, or another with the same methods."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ...core import __version__
from ...core.configuration import TokenRecoveryConfig
from ...data.fingerprint import model_digest, processor_digest
from ...data.prompts import add_instruction, build_prompt, count_visual_tokens, encode_rows
from .batching import Batch, check_length, position_limit
from .questions import BadRow, OpenedQuestion, Questions, RowQuestion, json_line

T = TypeVar("T")
S = TypeVar("S")

Share = tuple[Batch, Batch]
"""A batch, and those of its rows that have no line yet."""


class Answerer(abc.ABC):
    """An engine with everything that its answers depend on.

    Attributes:
        processor: The processor of the checkpoint.
        instruction: Appended to each question in the prompt, on a line of its own.
        max_new_tokens: Longest answer.
    """

    processor: Any
    instruction: str
    max_new_tokens: int

    @property
    @abc.abstractmethod
    def config(self) -> Any:
        """The checkpoint's config."""

    @property
    @abc.abstractmethod
    def section(self) -> TokenRecoveryConfig:
        """The settings of the run."""

    @abc.abstractmethod
    def engine_fingerprint(self) -> dict[str, Any]:
        """Everything about the engine and its weights that answers depend on, as JSON values."""

    @abc.abstractmethod
    def answers(self, questions: Questions, work: list[Share]) -> Iterator[dict[int, str]]:
        """Lines of the output by row, for every row of the work that has none, as they are finished."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that answers depend on besides the data, as JSON values."""
        return {
            "instruction": self.instruction,
            "max_new_tokens": self.max_new_tokens,
            "prompt": build_prompt(self.processor, "?", 1),
            **{f"token_recovery.{name}": value for name, value in self.section.overridable().items()},
            **self.engine_fingerprint(),
            "processor": processor_digest(self.processor),
            "reccomp_hf": __version__,
        }


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
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
        """The questions of `opened`."""
        return [row.question for row in self.opened]


@dataclasses.dataclass(frozen=True)
class ModelAnswerer(Answerer):
    """A model of transformers, which reads questions in batches."""

    model: Any
    processor: Any
    instruction: str
    max_new_tokens: int
    token_recovery: Mapping[str, Any]

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def section(self) -> TokenRecoveryConfig:
        """The config's section with the overrides."""
        return self.config.token_recovery.replace(self.token_recovery)

    def engine_fingerprint(self) -> dict[str, Any]:
        """Data type and weights."""
        return {"dtype": str(self.model.dtype).removeprefix("torch."), "model": model_digest(self.model)}

    def answers(self, questions: Questions, work: list[Share]) -> Iterator[dict[int, str]]:
        """Lines by row, a batch at a time.

        A batch that lacks a row is read as a whole, so that its answers are the same in half precision too.
        """
        for (_, missing), batch in prefetch(work, lambda entry: self.encode(questions, entry[0])):
            batch = self.without_long_prompts(questions, batch)
            lines = {bad_row.row: bad_row.line for bad_row in batch.bad_rows}
            if batch.questions:
                lines |= self.answer(batch.questions, batch.inputs)
            yield {row: lines[row] for row in missing}

    def encode(self, questions: Questions, batch: Batch) -> EncodedBatch:
        """Open and encode the images and questions of a batch."""
        opened, bad_rows = [], []
        for row in map(questions.open, batch):
            if isinstance(row, BadRow):
                bad_rows.append(row)
            else:
                opened.append(row)
        return EncodedBatch(opened, self._encode(opened) if opened else None, bad_rows)

    def without_long_prompts(self, questions: Questions, batch: EncodedBatch) -> EncodedBatch:
        """A batch in which prompts that leave no position for an answer are bad rows.

        Called in the thread of the model, which counts the visual tokens of prompts that are too long without
        compression.
        """
        limit = position_limit(self.model.config)
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
        return EncodedBatch(opened, self._encode(opened) if opened else None, bad_rows)

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
        limit = position_limit(model.config)  # a row stops there, even though others of its batch are still answered
        within = [row[: limit - length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        answers = self.processor.batch_decode(within, skip_special_tokens=True)
        rows = zip(questions, answers, read, uncompressed, strict=True)
        return {question.row: answer_line(question, answer.strip(), *counts) for question, answer, *counts in rows}


def prefetch(items: Iterable[T], prepare: Callable[[T], S]) -> Iterator[tuple[T, S]]:
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


def answer_line(question: RowQuestion, answer: str, read: int, uncompressed: int) -> str:
    """The output's line of a row with an answer, its visual tokens, and those of the stock model."""
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


__all__ = ["Answerer", "EncodedBatch", "ModelAnswerer", "Share", "answer_line", "prefetch"]
