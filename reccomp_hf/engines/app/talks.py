"""Conversations of several visitors with one model, each question answered under any settings."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import uuid
from collections import OrderedDict
from typing import Any

import torch
from PIL import Image

from ...conversation.conversation import Conversation, Turn
from ...core.counting import picture_tokens
from ...core.methods.registry import get_method
from .choices import OFF, Menu
from .limits import MAX_QUESTIONS, Refused

MAX_TALKS = 8
"""Conversations whose key-value caches are kept, of all visitors together; another one is asked again when needed."""
SECONDS = 60.0
"""Time after which an answer is cut off."""


@dataclasses.dataclass
class Visit:
    """A visitor's picture and questions.

    Attributes:
        image: RGB image; `None` before there is one.
        questions: Questions of the conversation about it.
        mode: Mode of the conversation, see [`Conversation`].
        key: Name of the conversation among all.
    """

    image: Image.Image | None = None
    questions: list[str] = dataclasses.field(default_factory=list)
    mode: str = "append"
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A conversation under some settings.

    Attributes:
        image: The picture.
        turns: The turns.
        seconds: Seconds that each turn took, for the whole call.
        mode: Mode in which it was held; a method whose tokens have no place reads everything again.
        method: `token_recovery.method`, or `"off"`.
        most: Visual tokens of the picture without compression, newlines included.
    """

    image: Image.Image
    turns: list[Turn]
    seconds: list[float]
    mode: str
    method: str
    most: int


class Talks:
    """Answers questions one at a time, whoever asks.

    Args:
        model: A compressed LLaVA, in eval mode.
        processor: The model's processor.
        max_new_tokens: Tokens of the longest answer.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self.model, self.processor, self.menu = model, processor, Menu(model.config)
        self._options = {"max_new_tokens": max_new_tokens, "do_sample": False, "max_time": SECONDS}
        self._held: OrderedDict[str, tuple[Conversation, list[float]]] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, visit: Visit, entry: str, tokens: int) -> Asked:
        """Answer the questions of a visit that have no answer yet under these settings.

        Args:
            visit: Picture and questions.
            entry: An entry of the menu.
            tokens: Tokens per picture, 0 for the dynamic budget.

        Raises:
            Refused: There is no picture, there are too many questions, or the settings do not fit the model.
        """
        if visit.image is None:
            raise Refused("Choose a picture first.")
        if len(visit.questions) > MAX_QUESTIONS:
            raise Refused(f"A conversation has at most {MAX_QUESTIONS} questions: begin a new one.")
        try:
            fields = self.menu.fields(entry, tokens)
            method = fields.get("method", self.menu.section.method)
            mode = visit.mode
            if entry == OFF:
                method, mode = OFF, "keep"
            elif mode == "append" and get_method(method).compact_only:
                mode = "rebuild"
            with self._lock:
                talk, seconds = self._talk(visit, mode, fields)
                for question in visit.questions[len(talk.turns) :]:
                    began = time.perf_counter()
                    talk.ask(question, None if talk.turns else visit.image, **self._options)
                    seconds.append(time.perf_counter() - began)
                turns, times = list(talk.turns), list(seconds)  # another tab of the visit may ask on
        except ValueError as error:
            raise Refused(f"These settings do not work here: {error}") from error
        except torch.OutOfMemoryError as error:
            with self._lock:
                self._held.clear()
            raise Refused("The machine has not enough memory for this question: try fewer tokens.") from error
        _, patches, newlines = picture_tokens(self.model.config, visit.image.size)
        return Asked(visit.image, turns, times, mode, method, patches + newlines)

    def warm_up(self) -> None:
        """Ask a question with and without compression, so that the first visitor's times are not those of a start."""
        image = Image.new("RGB", (640, 480), "grey")
        for entry in (OFF, "own"):
            self.ask(Visit(image, ["What is this?"]), entry, self.menu.own_tokens)
        self._held.clear()

    def _talk(self, visit: Visit, mode: str, fields: dict[str, Any]) -> tuple[Conversation, list[float]]:
        """The conversation of a visit under some settings, a new one if it is not held."""
        key = json.dumps([visit.key, mode, fields], sort_keys=True)
        held = self._held.pop(key, None)
        if held is None:
            held = Conversation(self.model, self.processor, mode, fields), []
        self._held[key] = held
        while len(self._held) > MAX_TALKS:
            self._held.popitem(last=False)
        return held


__all__ = ["MAX_TALKS", "Asked", "Talks", "Visit"]
