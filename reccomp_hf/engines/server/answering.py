"""Chat requests answered by one model, in one thread.

Requests wait in a queue, and the model's thread takes them out one after the other: this is the only place where the
model runs, and where a batch of requests could share one call of `generate`. Images are compressed before the first
token is generated, so a request that does not fit is refused before anything is sent, `prompt_tokens` counts what the
language model reads, and a request's `token_recovery` fields are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .errors import CallEnded, RequestError
from .requests import DEFAULT_MAX_TOKENS, ChatRequest


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request with its images compressed, ready for the language model.

    Attributes:
        inputs: Arguments of `generate`: the shortened prompt.
        prompt_tokens: Number of tokens in it.
        max_new_tokens: Number of tokens that may follow.
        visual_tokens: Number of image placeholders in it, newlines included.
        visual_tokens_before: The same number in the uncompressed prompt.
    """

    inputs: dict[str, Any]
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
    """

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.client_left = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def send(self, item: Prepared | str | Finished | Exception) -> None:
        """Pass on the next item; called in the model's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed once the server has stopped
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def receive(self) -> Any:
        """Wait for the next item: `Prepared`, pieces of text if the answer is streamed, and `Finished`.

        Raises:
            RequestError: Instead of `Prepared`: the chat template, the processor or the model refuses the request.
            CallEnded: The client has left, or the server is stopping.
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
    """

    def __init__(self, name: str, model: Any, processor: Any, aliases: Iterable[str] = ()) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.names = (name, *aliases)
        self.ends_at = float("inf")
        """The `time.monotonic` at which unfinished answers are given up."""
        self._waiting: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()  # a daemon: a long prefill must not delay the exit

    def submit(self, request: ChatRequest) -> Answer:
        """Queue a request; called in the event loop that reads the answer."""
        answer = Answer(request)
        self._waiting.put(answer)
        return answer

    def _run(self) -> None:
        while True:
            self._work(self._waiting.get())

    def _work(self, answer: Answer) -> None:
        try:
            prepared = self.prepare(answer.request, answer.client_left)
            answer.send(prepared)
            answer.send(self._generate(answer, prepared))
        except Exception as error:  # it goes to the client, and the thread to the next request
            answer.send(error)

    @torch.no_grad()
    def prepare(self, request: ChatRequest, client_left: threading.Event) -> Prepared:
        """Encode a request and compress its images; see `Answer.receive` for the errors."""
        self.check_wanted(client_left)
        model, image_token = self.model, self.processor.image_token
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        texts = [part.get("text", "") for message in request.messages for part in message["content"]]
        if any(image_token in text for text in texts):
            raise RequestError(f"A text contains {image_token!r}, which stands for an image: send the image instead.")
        reads_questions = "recovery_input_ids" in self.processor.model_input_names
        if request.images and reads_questions and not self.processor.questions_of(request.messages):
            raise RequestError("The image has no question: add a text part to the last user message.")
        try:
            inputs = self.processor.apply_chat_template(
                request.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            before = int((inputs["input_ids"] == model.config.image_token_id).sum())
            _check_length(inputs["input_ids"].shape[1] - before, limit)  # before the vision tower runs
            inputs = inputs.to(model.device, model.dtype)
            short, _ = model.compress_inputs(**inputs, token_recovery=request.token_recovery)
        except (ValueError, OverflowError, TemplateError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(" ".join(str(error).split())) from error
        ids, positions = short["input_ids"], short.get("position_ids")
        after = int((ids == model.config.image_token_id).sum())
        used = ids.shape[1] if positions is None else int(positions.max()) + 1
        _check_length(used, limit)
        longest = request.max_tokens or DEFAULT_MAX_TOKENS
        return Prepared(short, ids.shape[1], min(longest, limit - used), after, before)

    def _generate(self, answer: Answer, prepared: Prepared) -> Finished:
        request = answer.request
        if request.seed is not None:
            torch.manual_seed(request.seed)  # nothing else samples until this answer ends
        sequences = self.model.generate(
            **prepared.inputs,
            generation_config=self._generation_config(request, prepared.max_new_tokens),
            tokenizer=self.processor.tokenizer,
            stopping_criteria=[_WhileWanted(self, answer.client_left)],
            streamer=_PieceStreamer(self._decode, answer.send) if request.stream else None,
        )
        ids = sequences[0, prepared.prompt_tokens :].tolist()
        reason = "length" if len(ids) >= prepared.max_new_tokens else "stop"
        return Finished(self._decode(ids), len(ids), reason)

    def _generation_config(self, request: ChatRequest, max_new_tokens: int) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens = max_new_tokens
        config.stop_strings = request.stop or config.stop_strings
        if request.temperature is not None or request.top_p is not None:
            config.do_sample = request.temperature != 0
        if config.do_sample:
            config.temperature = request.temperature or config.temperature or 1.0
            config.top_p = request.top_p or config.top_p
        return config

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def check_wanted(self, client_left: threading.Event) -> None:
        """Check that somebody waits for the answer.

        Raises:
            CallEnded: The client has left, or the server is stopping.
        """
        if client_left.is_set():
            raise CallEnded("The client has left.")
        if time.monotonic() > self.ends_at:
            raise CallEnded("The server is being stopped.")


def _check_length(used: int, limit: int) -> None:
    if used >= limit:
        raise RequestError(
            f"The prompt takes {used} of the {limit} positions that the model has, and leaves none for an answer: "
            "shorten it, or set a smaller token_recovery.budget.",
            code="context_length_exceeded",
        )


class _WhileWanted(StoppingCriteria):
    """Ends a generation that nobody waits for."""

    def __init__(self, service: Service, client_left: threading.Event) -> None:
        self._service, self._client_left = service, client_left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(R,) bool, all false; raises `CallEnded` to stop."""
        self._service.check_wanted(self._client_left)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _PieceStreamer(BaseStreamer):
    """Decodes tokens as they come and sends the text that they add; together the pieces are the whole text.

    Args:
        decode: Turns token ids into text.
        send: Receives each piece; a character of several tokens comes with its last one.
    """

    def __init__(self, decode: Callable[[list[int]], str], send: Callable[[str], None]) -> None:
        self._decode, self._send = decode, send
        self._ids: list[int] | None = None  # generated so far; None before the prompt
        self._start = self._end = 0  # ids before `end` are sent; those from `start` on are decoded with the next ones

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is skipped, or the next tokens of the one row."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._flush(final=False)

    def end(self) -> None:
        """Send what is left."""
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        ids = self._ids or []
        # Decoded with the piece before: whether a piece begins with a space depends on what precedes it.
        sent, text = self._decode(ids[self._start : self._end]), self._decode(ids[self._start :])
        if len(text) <= len(sent) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return
        self._start, self._end = self._end, len(ids)
        self._send(text[len(sent) :])


__all__ = ["Answer", "Finished", "Prepared", "Service"]
