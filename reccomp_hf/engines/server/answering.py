"""Chat requests answered by one model, in one thread.

Requests wait in a queue. The model's thread takes the first one out together with those that arrive within a few
milliseconds and that one call of `generate` can answer: greedy ones with the same `token_recovery` fields. Images are
compressed before the first token is generated, so a request that does not fit is refused before anything is sent,
`prompt_tokens` counts what the language model reads, and an error of one request does not end the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import queue
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from .errors import CallEnded, RequestError
from .requests import DEFAULT_MAX_TOKENS, ChatRequest
from .rows import Row, Rows

BATCH_SIZE, WAITING, SECONDS = 16, 64, 600.0
"""Defaults of [`Service`]."""
_WINDOW = 0.005  # seconds
_RETRY_AFTER = 5  # seconds that a client is asked to wait


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request with its images compressed, ready for the language model.

    Attributes:
        prompt_tokens: Number of tokens in the shortened prompt.
        max_new_tokens: Number of tokens that may follow.
        visual_tokens: Number of image placeholders in it, newlines included.
        visual_tokens_before: The same number in the uncompressed prompt.
    """

    prompt_tokens: int
    max_new_tokens: int
    visual_tokens: int
    visual_tokens_before: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        text: The whole text.
        tokens: Number of generated tokens, the end token included.
        reason: `"length"` where `max_new_tokens` is reached, else `"stop"`.
    """

    text: str
    tokens: int
    reason: str


class Answer:
    """An answer on its way from the model's thread to the event loop in which it is created.

    Args:
        request: The request that it answers.
        seconds: Time until it is given up.
    """

    def __init__(self, request: ChatRequest, seconds: float = float("inf")) -> None:
        self.request = request
        self.ends_at = time.monotonic() + seconds
        self.client_left, self.done = threading.Event(), threading.Event()
        self.prepared = False
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def ended(self) -> bool:
        """Whether the last item was sent."""
        return self.done.is_set()

    def send(self, item: Any) -> None:
        """Pass on the next item; called in the model's thread."""
        self.prepared = True
        with contextlib.suppress(RuntimeError):  # the loop is closed once the server has stopped
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def finish(self, text: str, tokens: int, reason: str) -> None:
        """Send the end, see [`Finished`]."""
        self.done.set()
        self.send(Finished(text, tokens, reason))

    def fail(self, error: Exception) -> None:
        """Send an error as the end."""
        self.done.set()
        self.send(error)

    async def receive(self) -> Any:
        """Wait for the next item: `Prepared`, pieces of text if the answer is streamed, and `Finished`.

        Raises:
            RequestError: Instead of `Prepared`: the chat template, the processor or the model refuses the request.
            CallEnded: The client has left, the time is over, or the server is stopping.
            Exception: The model fails.
        """
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item


class Service:
    """One model and the thread that it runs in.

    Args:
        name: The model's name for clients.
        model: A compressed LLaVA in eval mode.
        processor: The model's processor.
        aliases: Other names that clients may use.
        batch_size: Most requests that are answered by one call of `generate`.
        waiting: Most requests that are answered or wait for it; others are refused.
        seconds: Time of a request until its answer is given up.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        aliases: Iterable[str] = (),
        *,
        batch_size: int = BATCH_SIZE,
        waiting: int = WAITING,
        seconds: float = SECONDS,
    ) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.names = (name, *aliases)
        self.ends_at = float("inf")
        """The `time.monotonic` at which unfinished answers are given up."""
        self.batch_size, self.waiting, self.seconds = batch_size, waiting, seconds
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self._longest_token = max(map(len, processor.tokenizer.get_vocab()), default=1)
        self._open: set[Answer] = set()
        self._queue: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()  # a daemon: a long prefill must not delay the exit

    def check_load(self) -> None:
        """Refuse a request where too many wait; called in the event loop, before the request is read.

        Raises:
            RequestError: With status 429 and the header `Retry-After`.
        """
        self._open = {answer for answer in self._open if not answer.ended}
        if len(self._open) >= self.waiting:
            message = f"{len(self._open)} requests are being answered or wait: try again in {_RETRY_AFTER} seconds."
            raise RequestError(message, 429, "rate_limit_exceeded", {"retry-after": str(_RETRY_AFTER)})

    def submit(self, request: ChatRequest) -> Answer:
        """Queue a request; called in the event loop that reads the answer.

        Raises:
            RequestError: Too many requests wait.
        """
        self.check_load()
        answer = Answer(request, self.seconds)
        self._open.add(answer)
        self._queue.put(answer)
        return answer

    # ---- the model's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        held: list[Answer] = []  # taken out of the queue, but not for the batch of the moment
        while True:
            batch = [held.pop(0) if held else self._queue.get()]
            batch += self._companions(batch[0], held)
            self._work(batch)

    def _companions(self, first: Answer, held: list[Answer]) -> list[Answer]:
        """Requests that can be answered with the first one; others that were looked at are added to `held`."""
        key = self._batch_key(first.request)
        if key is None:
            return []
        found = [answer for answer in held if self._batch_key(answer.request) == key][: self.batch_size - 1]
        held[:] = [answer for answer in held if answer not in found]
        ends_at = time.monotonic() + _WINDOW
        while len(found) < self.batch_size - 1:
            try:
                answer = self._queue.get(timeout=max(ends_at - time.monotonic(), 0))
            except queue.Empty:
                break
            (found if self._batch_key(answer.request) == key else held).append(answer)
        return found

    def _batch_key(self, request: ChatRequest) -> Any:
        """A value that is equal for requests of one batch; `None` for a request that is answered alone."""
        config = self._generation_config(request, 1)
        alone = config.do_sample or (config.num_beams or 1) > 1 or (config.repetition_penalty or 1.0) != 1.0
        if alone or config.no_repeat_ngram_size:  # these read the padding of a batch
            return None
        return bool(request.images), json.dumps(request.token_recovery, sort_keys=True)

    def _work(self, batch: Sequence[Answer]) -> None:
        accepted = [answer for answer in batch if self._accept(answer)]
        if not accepted:
            return
        try:
            self._answer(accepted)
        except Exception as error:  # it goes to the clients, and the thread to the next requests
            if len(accepted) > 1 and not any(answer.prepared for answer in accepted):
                for answer in accepted:  # one of them is at fault
                    self._work([answer])
                return
            for answer in accepted:
                if not answer.ended:
                    answer.fail(error)

    def _accept(self, answer: Answer) -> bool:
        """Whether a request can be answered; if not, its client gets the reason."""
        try:
            self.check_wanted(answer)
            self.check(answer.request)
        except Exception as error:
            answer.fail(error)
            return False
        return True

    def _answer(self, batch: Sequence[Answer]) -> None:
        """Answer requests with one batch key."""
        inputs, prepared = self.prepare([answer.request for answer in batch])
        for answer, one in zip(batch, prepared, strict=True):
            answer.send(one)
        request = batch[0].request
        config = self._generation_config(request, max(one.max_new_tokens for one in prepared))
        ends = config.eos_token_id
        end_tokens = set(ends if isinstance(ends, list) else [ends]) - {None}
        rows = [
            Row(answer, one.max_new_tokens, end_tokens, self._decode)
            for answer, one in zip(batch, prepared, strict=True)
        ]
        if request.seed is not None:
            torch.manual_seed(request.seed)  # nothing else samples until this answer ends
        self.model.generate(**inputs, generation_config=config, stopping_criteria=[Rows(rows, self.check_wanted)])

    def check(self, request: ChatRequest) -> None:
        """Check what can be known of a request before its images are processed.

        Raises:
            RequestError: The text is too long, contains a placeholder, or lacks a question.
        """
        texts = [part.get("text", "") for message in request.messages for part in message["content"]]
        if any(self.processor.image_token in text for text in texts):
            raise RequestError(
                f"A text contains {self.processor.image_token!r}, which stands for an image: send the image instead."
            )
        characters = sum(map(len, texts))
        if characters > self._positions * self._longest_token:  # whatever its tokens are
            _check_length(-(-characters // self._longest_token), self._positions)
        reads_questions = "recovery_input_ids" in self.processor.model_input_names
        if request.images and reads_questions and not self.processor.questions_of(request.messages):
            raise RequestError("The image has no question: add a text part to the last user message.")
        try:
            prompt = self.processor.apply_chat_template(request.messages, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:
            raise RequestError(" ".join(str(error).split())) from error
        _check_length(len(self.processor.tokenizer(prompt)["input_ids"]) - request.images, self._positions)

    @torch.no_grad()
    def prepare(self, requests: Sequence[ChatRequest]) -> tuple[dict[str, Any], list[Prepared]]:
        """Encode requests with one batch key and compress their images.

        Returns:
            Arguments of `generate`, padded on the left, and the numbers of each request.

        Raises:
            RequestError: The processor or the model refuses a request.
        """
        image_id = self.model.config.image_token_id
        try:
            inputs = self.processor.apply_chat_template(
                [request.messages for request in requests],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
            before = (inputs["input_ids"] == image_id).sum(-1).tolist()
            inputs = inputs.to(self.model.device, self.model.dtype)
            short, _ = self.model.compress_inputs(**inputs, token_recovery=requests[0].token_recovery)
        except (ValueError, OverflowError, TemplateError) as error:
            raise RequestError(" ".join(str(error).split())) from error
        lengths = short["attention_mask"].sum(-1).tolist()
        after = (short["input_ids"] == image_id).sum(-1).tolist()
        positions = short.get("position_ids")
        used = lengths if positions is None else (positions.amax(-1) + 1).tolist()
        for count in used:
            _check_length(count, self._positions)
        return short, [
            Prepared(length, min(request.max_tokens or DEFAULT_MAX_TOKENS, self._positions - count), kept, stock)
            for request, length, count, kept, stock in zip(requests, lengths, used, after, before, strict=True)
        ]

    def _generation_config(self, request: ChatRequest, max_new_tokens: int) -> Any:
        config = copy.copy(self.model.generation_config)
        config.max_new_tokens, config.stop_strings = max_new_tokens, None
        if request.temperature is not None or request.top_p is not None:
            config.do_sample = request.temperature != 0
        if config.do_sample:
            config.temperature = request.temperature or config.temperature or 1.0
            config.top_p = request.top_p or config.top_p
        return config

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def check_wanted(self, answer: Answer) -> None:
        """Check that somebody waits for an answer.

        Raises:
            CallEnded: The client has left, the request's time is over, or the server is stopping.
        """
        if answer.client_left.is_set():
            raise CallEnded("The client has left.")
        now = time.monotonic()
        if now > self.ends_at:
            raise CallEnded("The server is being stopped.")
        if now > answer.ends_at:
            raise CallEnded(f"The answer took longer than {self.seconds:g} seconds: ask for fewer tokens.", 504)


def _check_length(used: int, limit: int) -> None:
    if used >= limit:
        raise RequestError(
            f"The prompt takes {used} of the {limit} positions that the model has, and leaves none for an answer: "
            "shorten it, or set a smaller token_recovery.budget.",
            code="context_length_exceeded",
        )


__all__ = ["BATCH_SIZE", "SECONDS", "WAITING", "Answer", "Finished", "Prepared", "Service"]
