"""The actions of the page's controls: each handler returns values for the page's places."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ...core.checks import is_tiled
from ...demo import draw_scene
from . import pictures
from .choices import OFF
from .limits import Refused, check_question, read_picture
from .talks import Asked, Talks, Visit

logger = logging.getLogger(__name__)

COLUMNS = ("A", "B")
EMPTY = '<p class="rc-empty">Choose a picture, or an example, and ask a question.</p>'
BLANK = (*[EMPTY] * (len(COLUMNS) + 1), "")
"""A panel for each column, the heat maps and the log before the first question."""
_UNCHANGED = len(BLANK)

EXAMPLES = (
    (1_000_000, "What letter is on the cyan sign?"),
    (1_000_000, "What color is the ring?"),
    (1_000_002, "Is there an orange circle?"),
    (1_000_010, "How many objects are there?"),  # the demo model errs with 16 tokens: counting suffers most
)
"""Seeds of drawn scenes, held out from training, with a question about each."""


class Handlers:
    """The handlers of a page. `chosen` is an entry of the menu and a number of tokens for each column in turn.

    Args:
        talks: Answers the questions.
    """

    def __init__(self, talks: Talks) -> None:
        self._talks, self._names = talks, {value: label for label, value in talks.menu.entries()}

    def upload(self, path: str | None) -> tuple[Any, ...]:
        """Begin with a new picture, or with none: values for picture, visit, status and results."""
        if path is None:
            return gr.skip(), None, "", *BLANK
        try:
            image = read_picture(path)
        except Refused as error:
            return None, None, _refused(error), *BLANK
        cropped = image.width != image.height and not is_tiled(self._talks.menu.config)
        middle = " The model sees its middle square." if cropped else ""
        text = f"The picture has {image.width} x {image.height} pixels.{middle} Ask a question about it."
        return gr.skip(), Visit(image), pictures.note(text), *BLANK

    def answer(self, before: Visit | None, text: str, mode: str, *chosen: Any) -> tuple[Any, ...]:
        """Ask a further question: values for visit, question, status and results."""
        try:
            if before is None:
                raise Refused("Choose a picture first.")
            visit = dataclasses.replace(before, questions=[*before.questions, check_question(text)], mode=mode)
            return visit, "", *self._results(visit, chosen)
        except Refused as error:
            return before, gr.skip(), _refused(error), *[gr.skip()] * _UNCHANGED

    def again(self, before: Visit | None, mode: str, *chosen: Any) -> tuple[Any, ...]:
        """Answer the same questions under other settings: values for visit, status and results."""
        if before is None or not before.questions:
            return before, *[gr.skip()] * (1 + _UNCHANGED)
        try:
            visit = dataclasses.replace(before, mode=mode)
            return visit, *self._results(visit, chosen)
        except Refused as error:
            return before, _refused(error), *[gr.skip()] * _UNCHANGED

    def restart(self, before: Visit | None) -> tuple[Any, ...]:
        """Forget the questions, keep the picture: values for visit, status and results."""
        return before and Visit(before.image), pictures.note("A new conversation begins."), *BLANK

    def example(self, number: int) -> Callable[..., tuple[Any, ...]]:
        """A handler that asks an example's question: values for picture, visit, status and results."""
        seed, text = EXAMPLES[number]

        def show(mode: str, *chosen: Any) -> tuple[Any, ...]:
            image = draw_scene(seed).image
            try:
                visit = Visit(image, [text], mode)
                return image, visit, *self._results(visit, chosen)
            except Refused as error:
                return image, Visit(image), _refused(error), *BLANK

        return show

    def fit(self, entry: str, tokens: int) -> Any:
        """Move a slider where an entry of the menu wants it."""
        return gr.Slider(value=self._talks.menu.tokens_for(entry, int(tokens)), **self.slider(entry))

    def slider(self, entry: str) -> dict[str, Any]:
        """Whether a slider can be moved, and a sentence about it."""
        use = self._talks.menu.takes_budget(entry)
        sentences = {
            "none": "Every token is read." if entry == OFF else "The method decides for each picture.",
            "required": "This method needs a number.",
            "optional": "0: the method decides for each picture.",
        }
        return {"interactive": use != "none", "info": sentences[use]}

    def _results(self, visit: Visit, chosen: Sequence[Any]) -> tuple[Any, ...]:
        """The status, a panel for each column, the heat maps and the log."""
        asked = []
        for letter, entry, tokens in zip(COLUMNS, chosen[::2], chosen[1::2], strict=True):
            name = f"{letter}: {self._names.get(entry, entry)}"
            try:
                asked.append((name, self._talks.ask(visit, entry, int(tokens))))
            except Refused:
                raise
            except Exception as error:
                logger.exception("An answer failed.")
                raise Refused(f"The answer failed ({type(error).__name__}); the server's log says why.") from error
        panels = [pictures.panel(one, self._talks.processor, name) for name, one in asked]
        heat = pictures.heat_maps(asked[0][1], self._talks.processor)
        return pictures.note(_verdict(asked)), *panels, heat, pictures.log(asked)


def _verdict(asked: Sequence[tuple[str, Asked]]) -> str:
    """A sentence with all answers and their cost."""
    parts = []
    for (_, one), letter in zip(asked, COLUMNS, strict=True):
        turn = one.turns[-1]
        cost = f"{turn.visual_tokens:,} visual tokens, {1000 * one.seconds[-1]:,.0f} ms"
        parts.append(f"{letter} answers {turn.answer or 'nothing'} ({cost})")
    return f"{asked[0][1].turns[-1].question} {'; '.join(parts)}."


def _refused(error: Refused) -> str:
    return pictures.note(str(error), refused=True)


__all__ = ["BLANK", "COLUMNS", "EMPTY", "EXAMPLES", "Handlers"]
