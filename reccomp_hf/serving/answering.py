"""Answering chat requests with one model, by the parts of transformers' own server.

Transformers' handler asks a model manager for model and processor, applies the chat template, calls `generate` and
cuts the answer off behind the prompt. Here the pictures are compressed before the handler is called, so that the
prompt it sees is the shortened one: what is wrong with a request is known before anything is sent, `prompt_tokens` is
what the language model reads, and a request's settings are its own. All of a model's work is done in one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import BatchFeature, StoppingCriteria

from .errors import CallEnded, RequestError
from .requests import DEFAULT_MAX_TOKENS, ChatRequest

logger = logging.getLogger(__name__)

_NEEDED = "reccomp-hf serve runs on the server parts of transformers 5.12 or newer (transformers.cli.serving)"


@dataclasses.dataclass(frozen=True)
class ServerParts:
    """What is used of transformers' server.

    Attributes:
        handler: `ChatCompletionHandler`.
        state: `GenerationState`.
        modality: The `Modality` of models that read pictures and text.
    """

    handler: Any
    state: Any
    modality: Any


def server_parts() -> ServerParts:
    """Find transformers' server and check that it is called as it was when this was written.

    Raises:
        ImportError: Transformers has none, or one that differs, or what it needs is not installed.
    """
    here = f"this is transformers {transformers.__version__}"
    other = "vLLM is another way to serve a checkpoint."
    try:
        from transformers.cli.serving import utils
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ImportError(f"{_NEEDED}; {here}. Install a newer one; {other}") from error
    if not is_serve_available():
        raise ImportError("reccomp-hf serve needs fastapi, uvicorn and openai: pip install 'reccomp_hf[serve]'")
    differs = f"{_NEEDED}, and in {here} they differ from those that are known"
    try:
        from transformers.cli.serving import chat_completion  # needs what was just looked for

        parts = ServerParts(chat_completion.ChatCompletionHandler, utils.GenerationState, utils.Modality.VLM)
        taken = {
            "ChatCompletionHandler": (parts.handler, {"model_manager", "generation_state"}),
            "ChatCompletionHandler.handle_request": (parts.handler.handle_request, {"body", "request_id"}),
            "GenerationState.get_manager": (parts.state.get_manager, {"model_id"}),
            "GenerateManager.async_submit": (utils.GenerateManager.async_submit, {"fn"}),
        }
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{differs} ({error}). Install transformers 5.24; {other}") from error
    for name, (function, names) in taken.items():
        if not names <= inspect.signature(function).parameters.keys():
            raise ImportError(f"{differs} ({name} takes other arguments). Install transformers 5.24; {other}")
    return parts


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request on its way to the language model.

    Attributes:
        inputs: What `generate` takes: the shortened prompt.
        prompt_tokens: Its tokens.
        max_new_tokens: How many may follow.
        visual_tokens: Placeholders that the prompt's pictures have, newlines included, now.
        visual_tokens_before: The same in the uncompressed prompt.
    """

    inputs: BatchFeature
    prompt_tokens: int
    max_new_tokens: int
    visual_tokens: int
    visual_tokens_before: int


class Service:
    """One model, and the thread that all its work is done in.

    Args:
        name: What clients call the model.
        model: A compressed LLaVA in eval mode.
        processor: Its processor.
        aliases: What they may call it as well.
    """

    def __init__(self, name: str, model: Any, processor: Any, aliases: Iterable[str] = ()) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.names = (name, *aliases)
        self.parts = server_parts()
        self.state = self.parts.state()
        self.ends_at = float("inf")
        """When answers that are still being made are given up, by `time.monotonic`."""

    async def answer(self, request: ChatRequest, request_id: str, gone: threading.Event) -> Any:
        """The response to a request: a streaming one whose stream has not begun, or a whole one.

        Args:
            request: What is asked.
            request_id: Names the answer.
            gone: Set where the client is gone.

        Raises:
            RequestError: The chat template, the processor or the model refuses the request.
            CallEnded: The client is gone, or the server is being stopped.
        """
        began = time.monotonic()
        thread = self.state.get_manager(self.name)
        prepared = await thread.async_submit(self.prepare, request, gone)
        logger.info(
            "%s: %d of %d visual tokens, prompt of %d tokens, after %.2f s",
            request_id,
            prepared.visual_tokens,
            prepared.visual_tokens_before,
            prepared.prompt_tokens,
            time.monotonic() - began,
        )
        body = {
            "model": self.name,
            "messages": [],  # they are in the prepared prompt
            "stream": request.stream,
            "max_tokens": prepared.max_new_tokens,
            **({"stop": request.stop} if request.stop else {}),
        }
        handler = self.parts.handler(_ManagerOfCall(self, request, prepared, gone), self.state)
        response = await handler.handle_request(body, request_id)
        if request.stream:
            response.body_iterator = _with_end(response.body_iterator)
        response.headers["x-visual-tokens"] = str(prepared.visual_tokens)
        response.headers["x-visual-tokens-uncompressed"] = str(prepared.visual_tokens_before)
        return response

    @torch.no_grad()
    def prepare(self, request: ChatRequest, gone: threading.Event) -> Prepared:
        """Encode a request and compress its pictures; see `answer` for what is raised."""
        self.check_waited_for(gone)
        model, image_token = self.model, self.processor.image_token
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        texts = [part.get("text", "") for message in request.messages for part in message["content"]]
        if any(image_token in text for text in texts):
            raise RequestError(f"A text holds {image_token!r}, which stands for a picture: send the picture instead.")
        reads_questions = "recovery_input_ids" in self.processor.model_input_names
        if request.pictures and reads_questions and not self.processor.questions_of(request.messages):
            raise RequestError("The picture has no question: add a text part to the last user message.")
        try:
            inputs = self.processor.apply_chat_template(
                request.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            is_image = inputs["input_ids"] == model.config.image_token_id
            before = int(is_image.sum())
            self._check_length(inputs["input_ids"].shape[1] - before, limit)  # before pictures are read
            inputs = inputs.to(model.device, model.dtype)
            short, _ = model.compress_inputs(**inputs, token_recovery=request.token_recovery)
        except (ValueError, OverflowError, TemplateError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(" ".join(str(error).split())) from error
        ids, positions = short["input_ids"], short.get("position_ids")
        after = int((ids == model.config.image_token_id).sum())
        used = ids.shape[1] if positions is None else int(positions.max()) + 1
        self._check_length(used, limit)
        longest = request.max_tokens or DEFAULT_MAX_TOKENS
        return Prepared(BatchFeature(short), ids.shape[1], min(longest, limit - used), after, before)

    def _check_length(self, used: int, limit: int) -> None:
        if used >= limit:
            raise RequestError(
                f"The prompt takes {used} of the {limit} positions that the model has, and leaves none for an answer: "
                "shorten it, or set a smaller token_recovery.budget.",
                code="context_length_exceeded",
            )

    def check_waited_for(self, gone: threading.Event) -> None:
        """Stop where nobody waits.

        Raises:
            CallEnded: As it says.
        """
        if gone.is_set():
            raise CallEnded("The client is gone.")
        if time.monotonic() > self.ends_at:
            raise CallEnded("The server is being stopped.")


async def _with_end(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The events of a stream, and OpenAI's last one where no error ended it."""
    failed = False
    async with contextlib.aclosing(events):
        async for sent in events:  # one or several
            failed = failed or any(event.startswith('data: {"error":') for event in sent.split("\n\n"))
            yield sent
    if not failed:
        yield "data: [DONE]\n\n"


class _ManagerOfCall:
    """What transformers' handler takes for its model manager: it knows one request, which is prepared."""

    force_model = None

    def __init__(self, service: Service, request: ChatRequest, prepared: Prepared, gone: threading.Event) -> None:
        self._model = _ModelOfCall(service, request, gone)
        self._processor = SimpleNamespace(
            apply_chat_template=lambda *args, **kwargs: prepared.inputs,
            decode=service.processor.decode,
            tokenizer=service.processor.tokenizer,
        )
        self._modality = service.parts.modality

    def process_model_name(self, name: str) -> str:
        """The name as it is: no revision belongs to it."""
        return name

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the handler goes on with."""
        return self._model, self._processor

    def get_model_modality(self, *args: Any, **kwargs: Any) -> Any:
        """Pictures and text."""
        return self._modality


class _ModelOfCall:
    """The model with a request's own way to generate."""

    def __init__(self, service: Service, request: ChatRequest, gone: threading.Event) -> None:
        self._service, self._request, self._gone = service, request, gone
        model = service.model
        self.config, self.device, self.generation_config = model.config, model.device, model.generation_config

    def generate(self, generation_config: Any, tokenizer: Any, **kwargs: Any) -> Any:
        """The model's own, sampling as the request says, until nobody waits any more."""
        request = self._request
        if request.temperature is not None or request.top_p is not None:
            generation_config.do_sample = request.temperature != 0
        if generation_config.do_sample:
            generation_config.temperature = request.temperature or generation_config.temperature or 1.0
            generation_config.top_p = request.top_p or generation_config.top_p
        if request.seed is not None:
            torch.manual_seed(request.seed)  # here, where nothing else runs until the answer is there
        try:
            return self._service.model.generate(
                generation_config=generation_config,
                tokenizer=self._service.processor.tokenizer,
                stopping_criteria=[_WhileWaitedFor(self._service, self._gone)],
                **kwargs,
            )
        except (RuntimeError, ValueError) as error:
            if isinstance(error, CallEnded):
                raise
            if request.stream:  # else the exception is told by the server
                logger.exception("The answer ends here.")
            # Transformers puts it between the quotes of a JSON string.
            raise RuntimeError(json.dumps(" ".join(str(error).split()))[1:-1]) from error


class _WhileWaitedFor(StoppingCriteria):
    """Ends a generation for which nobody waits."""

    def __init__(self, service: Service, gone: threading.Event) -> None:
        self._service, self._gone = service, gone

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(R,) bool, false; raises `CallEnded` else."""
        self._service.check_waited_for(self._gone)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


__all__ = ["Service", "server_parts"]
