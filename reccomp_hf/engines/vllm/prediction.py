"""`predict` by vLLM: requests join and leave its batches one by one; an answer is written when it is finished."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.digest import checkpoint_digest
from ...checkpoints.processors import load_processor
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import picture_tokens
from ...core.tokenizing import token_ids
from ...data.prompts import add_instruction, build_prompt
from ..predict import Columns, Prediction, predict_by, process_state
from ..predict.answering import Answerer, Share, answer_line, prefetch
from ..predict.batching import check_length, position_limit
from ..predict.defaults import DEFAULT_NEW_TOKENS
from ..predict.questions import BadRow, OpenedQuestion, Questions, RowQuestion
from .budgets import count_tokens, question_budget
from .checks import keeps_places


def predict_with_vllm(
    llm: Any,
    data: str | Path,
    output: str | Path,
    *,
    columns: Columns | None = None,
    instruction: str = "",
    limit: int | None = None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Prediction:
    """Ask every question of a file or folder in vLLM, greedily, with the lines, errors and resuming of `predict`.

    Args:
        llm: A `vllm.LLM` on the folder of a compressed checkpoint, see `start_engine`.
        data: As in `predict`, like the remaining arguments.
        output: The file to write.
        columns: Columns of the data.
        instruction: Appended to each question in the prompt.
        limit: Read the first `limit` rows only.
        max_new_tokens: Longest answer.
        overwrite: Start over.
        progress: Show a progress bar.

    Returns:
        The summary of the run.

    Raises:
        FileExistsError: The output is finished.
        ValueError: Data or settings that are not valid, an output that was begun with others, one by transformers
            among them, or several processes.
        OSError: Data that cannot be read.
    """
    check_one_process()
    answerer = VllmAnswerer(llm, instruction, max_new_tokens)
    return predict_by(
        answerer, data, output, columns=columns, limit=limit, overwrite=overwrite, progress=progress, batch_size=1
    )


def check_one_process() -> None:
    """Check that no launcher started this process among others, each of which would start an engine of its own.

    Raises:
        ValueError: There are several.
    """
    if (processes := process_state("cpu").num_processes) > 1:
        raise ValueError(
            f"vLLM answers in one process, got {processes}: start the command without accelerate or torchrun. One "
            "engine batches all questions."
        )


class VllmAnswerer(Answerer):
    """vLLM's engine on a compressed checkpoint."""

    def __init__(self, llm: Any, instruction: str, max_new_tokens: int) -> None:
        self.llm, self.instruction, self.max_new_tokens = llm, instruction, max_new_tokens
        self._model = llm.llm_engine.vllm_config.model_config
        self._at_once = 2 * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs  # as many wait as are answered
        self.processor = load_processor(Path(self._model.model))

    @property
    def config(self) -> Any:
        """The checkpoint's config, with the engine's overrides."""
        return self._model.hf_config

    @property
    def section(self) -> TokenRecoveryConfig:
        """The config's section."""
        return self.config.token_recovery

    def engine_fingerprint(self) -> dict[str, Any]:
        """The engine's name, longest sequence and data type, and the weights."""
        return {
            "engine": "vllm",
            "max_model_len": self._model.max_model_len,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "model": checkpoint_digest(self._model.model),
        }

    def answers(self, questions: Questions, work: list[Share]) -> Iterator[dict[int, str]]:
        """Lines by row, one by one; images are opened while the engine works."""
        rows = [row for _, missing in work for row in missing]
        opened, left = prefetch(rows, questions.open), len(rows)
        waiting: dict[str, _Sent] = {}
        try:
            while left or waiting:
                for row, question in itertools.islice(opened, self._at_once - len(waiting)):
                    left -= 1
                    request = self._request(questions, question)
                    if isinstance(request, BadRow):
                        yield {row: request.line}
                    else:
                        waiting[self._send(request)] = request
                for result in self.llm.llm_engine.step() if waiting else ():
                    if result.finished:
                        yield self._line(waiting.pop(result.request_id), result)
        finally:
            if waiting:
                self.llm.llm_engine.abort_request(list(waiting))

    def _request(self, questions: Questions, opened: OpenedQuestion | BadRow) -> _Sent | BadRow:
        """A row's request, or the reason why it cannot be asked, as a model of transformers would say it."""
        if isinstance(opened, BadRow):
            return opened
        question, images, config = opened.question, opened.images, self.config
        text = build_prompt(self.processor, add_instruction(question.text, self.instruction), len(images))
        stock = sum(sum(picture_tokens(config, image.size)[1:]) for image in images)
        budget = question_budget(self.section, question.clip_texts)
        read = sum(count_tokens(config, budget, image.size) for image in images)
        words = len(token_ids(self.processor.tokenizer, [text], add_special_tokens=True)[0]) - len(images)
        room = self.max_new_tokens
        try:
            for length, limit in (
                (words + (stock if keeps_places(config) else read), position_limit(config)),
                (words + read, self._model.max_model_len),
            ):
                check_length(length, limit)
                room = min(room, limit - length)
        except ValueError as error:
            return questions.bad_row(question.row, question.id, error)
        prompt = {
            "prompt": text,
            "multi_modal_data": {"image": images},
            "mm_processor_kwargs": {"recovery_text": question.clip_texts},
        }
        return _Sent(question, prompt, room, stock)

    def _send(self, request: _Sent) -> str:
        """Put a request into the engine's queue, and return the id that its output will have."""
        from vllm import SamplingParams

        penalty = self.llm.get_default_sampling_params().repetition_penalty  # of the checkpoint's generation config
        greedy = SamplingParams(temperature=0, max_tokens=request.room, repetition_penalty=penalty, detokenize=False)
        (name,) = self.llm.enqueue([request.prompt], greedy, use_tqdm=False)
        return name.rpartition("-")[0] or name  # vLLM appends random letters inside the engine

    def _line(self, request: _Sent, result: Any) -> dict[int, str]:
        """A row's line of the output."""
        answer = self.processor.decode(result.outputs[0].token_ids, skip_special_tokens=True)
        read = result.prompt_token_ids.count(self.config.image_token_id)
        return {request.question.row: answer_line(request.question, answer.strip(), read, request.uncompressed)}


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A row's request.

    Attributes:
        question: The row.
        prompt: The request as vLLM takes it.
        room: Tokens of the longest answer.
        uncompressed: Visual tokens of the stock model.
    """

    question: RowQuestion
    prompt: dict[str, Any]
    room: int
    uncompressed: int


__all__ = ["VllmAnswerer", "check_one_process", "predict_with_vllm"]
