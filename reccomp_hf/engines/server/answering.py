"""Chat requests answered by one model, in one thread.

Requests wait in a list. The model's thread takes the first one out together with those that arrive within a few
milliseconds and that one call of `generate` can answer: greedy ones with the same `token_recovery` fields. Images are
compressed before the first token is generated, so a request that does not fit is refused before anything is sent,
`prompt_tokens` counts what the language model reads, and an error of one request does not end the others.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from ...core.tokenizing import token_ids
from .answers import Answer, Prepared
from .errors import CallEnded, RequestError, too_busy
from .requests import DEFAULT_MAX_TOKENS, ChatRequest
from .rows import Row, Rows

BATCH_SIZE, WAITING, SECONDS = 16, 64, 600.0
"""Defaults of [`Service`]."""
_WINDOW = 0.005  # seconds
_MOST_POSITIONS = 1 << 20  # of a model that has no limit
_LONGEST_TOKEN = 20  # characters, on average: some vocabularies have tokens of 128 spaces
_PIECE = 5_000  # characters that are tokenized at once
_MAX_PIXELS = 400_000_000  # of all images that wait, each of three bytes
_SMALL = 4_000_000  # pixels of a request that is taken nevertheless
_BATCHED = frozenset(
    [
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "min_new_tokens"),
        *("temperature", "top_k", "top_p", "suppress_tokens", "use_cache", "transformers_version"),
    ]
)  # fields of a generation config with which a row of a batch gets the answer that it gets alone


class Service:
    """One model and the thread that it runs in.

    Args:
        name: The model's name for clients.
        model: A compressed LLaVA in eval mode.
        processor: The model's processor.
        aliases: Other names that clients may use.
        batch_size: Most requests that are answered by one call of `generate`, with as many images in all; a request
            with more images is answered alone.
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
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MOST_POSITIONS
        longest = max(map(len, processor.tokenizer.get_vocab()), default=1)
        self._longest_token = min(longest, _LONGEST_TOKEN)
        self._waiting: list[Answer] = []  # in the order of their arrival
        self._running: Sequence[Answer] = ()
        self._arrival = threading.Condition()  # held while either of them changes
        threading.Thread(target=self._run, daemon=True).start()  # a daemon: a long prefill must not delay the exit

    @property
    def open(self) -> int:
        """Number of requests that wait or are being answered."""
        return len(self._waiting) + sum(not answer.ended for answer in self._running)

    def check_load(self) -> None:
        """Refuse a request where too many wait; called in the event loop, before the request is read.

        Raises:
            RequestError: With status 429 and the header `Retry-After`.
        """
        self.drop_unwanted()
        if self.open >= self.waiting:
            raise too_busy(f"{self.open} requests are being answered or wait")

    def submit(self, request: ChatRequest) -> Answer:
        """Queue a request; called in the event loop that reads the answer.

        Raises:
            RequestError: Too many requests wait, or too many pixels.
        """
        self.check_load()
        answer = Answer(request, self.seconds, self._batch_key(request))
        with self._arrival:
            pixels = request.pixels + sum(other.request.pixels for other in self._waiting)
            if pixels > _MAX_PIXELS and request.pixels > _SMALL:
                raise too_busy(f"{pixels:,} pixels wait")
            self._waiting.append(answer)
            self._arrival.notify()
        asyncio.get_running_loop().call_later(self.seconds + 0.01, self.drop_unwanted)
        return answer

    def drop_unwanted(self) -> None:
        """End the answers that nobody waits for any more, and that have not begun."""
        with self._arrival:
            for answer in list(self._waiting):
                try:
                    self.check_wanted(answer)
                except CallEnded as error:
                    self._waiting.remove(answer)
                    answer.fail(error)

    # ---- the model's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._work(self._next_batch())

    def _next_batch(self) -> Sequence[Answer]:
        """Wait for a request, and a few milliseconds for others that can be answered with it."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._waiting)
            first = self._waiting[0]
            if first.key is not None:
                self._arrival.wait_for(lambda: len(self._companions(first)) >= self.batch_size, _WINDOW)
            self._running = self._companions(first)
            self._waiting = [answer for answer in self._waiting if answer not in self._running]
        return self._running

    def _companions(self, first: Answer) -> list[Answer]:
        """The first request, unless its client has left, and those that wait and can be answered with it."""
        found: list[Answer] = []
        images = 0
        for answer in self._waiting:
            fits = answer is first or (first.key is not None and answer.key == first.key)
            if fits and (not found or images + answer.request.images <= self.batch_size):
                found.append(answer)
                images += answer.request.images
        return found[: self.batch_size]

    def _batch_key(self, request: ChatRequest) -> Any:
        """A value that is equal for requests of one batch; `None` for a request that is answered alone."""
        config = self._generation_config(request, 1)
        if config.do_sample or not _BATCHED.issuperset(_fields_set(config)):
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
        self._check_texts(texts)
        reads_questions = "recovery_input_ids" in self.processor.model_input_names
        if request.images and reads_questions and not self.processor.questions_of(request.messages):
            raise RequestError("The image has no question: add a text part to the last user message.")
        try:
            prompt = self.processor.apply_chat_template(request.messages, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:
            raise RequestError(" ".join(str(error).split())) from error
        if len(prompt.encode()) >= self._positions:  # a token stands for one byte at least
            (tokens,) = token_ids(self.processor.tokenizer, [prompt], add_special_tokens=True)
            _check_length(len(tokens) - request.images, self._positions)

    def _check_texts(self, texts: Sequence[str]) -> None:
        """Refuse long texts; of one that is too long, little more than what fits is tokenized."""
        characters = sum(map(len, texts))
        least = -(-characters // self._longest_token)  # whatever the tokens are
        _check_length(least, self._positions)
        if characters < 4 * self._positions:
            return
        tokens = cuts = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                piece = text[start : start + _PIECE]
                tokens += len(token_ids(self.processor.tokenizer, [piece])[0])
                cuts += 1  # each may have added a few tokens
                _check_length(tokens - 8 * cuts, self._positions)

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
            section = self.model.config.token_recovery.replace(requests[0].token_recovery)
            inputs = self.processor.apply_chat_template(
                [request.messages for request in requests],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left", "recovery_rules": section.rules},
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


def _fields_set(config: Any) -> set[str]:
    """Names of the fields of a generation config that differ from its defaults."""
    fields = config.to_diff_dict()
    return {name for name, value in fields.items() if value is not None and value is not False and name[0] != "_"}


def _check_length(used: int, limit: int) -> None:
    if used >= limit:
        raise RequestError(
            f"The prompt takes {used} of the {limit} positions that the model has, and leaves none for an answer: "
            "shorten it, or set a smaller token_recovery.budget.",
            code="context_length_exceeded",
        )


__all__ = ["BATCH_SIZE", "SECONDS", "WAITING", "Service"]
