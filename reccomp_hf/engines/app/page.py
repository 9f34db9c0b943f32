"""The page itself: its controls, and the handlers that join them to the conversations."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...conversation.conversation import MODES
from ...demo import CHECKPOINTS, draw_scene
from . import pictures
from .choices import OFF, OWN
from .limits import MAX_BYTES, MAX_WAITING, Refused, check_question, read_picture
from .talks import Asked, Talks, Visit

logger = logging.getLogger(__name__)

EXAMPLES = (
    (1_000_000, "What letter is on the cyan sign?"),
    (1_000_000, "What color is the ring?"),
    (1_000_001, "How many objects are there?"),
    (1_000_004, "Is there a red circle?"),
)
"""Seeds of drawn scenes, held out from training, with a question about each."""

_MODE_WORDS = {
    "append": "add what the new question needs",
    "rebuild": "choose again for the new question alone",
    "keep": "keep the first choice",
}
_EMPTY = '<p class="rc-empty">Choose a picture, or an example, and ask a question.</p>'
_PRIVACY = (
    f'<p class="rc-empty">A picture may have {MAX_BYTES / 1e6:.0f} MB. Pictures stay on the machine that serves this '
    "page; their files are deleted after an hour. A time is that of one call on this machine; with the first question "
    "about a picture it includes the vision tower.</p>"
)
_COLUMNS = ("A", "B")


def build_page(talks: Talks, name: str, folder: Path) -> gr.Blocks:
    """The page for a model.

    Args:
        talks: Answers the questions.
        name: Name of the model, for the title.
        folder: A folder of the page's own, for the pictures of the examples.
    """
    menu = talks.menu
    page = gr.Blocks(title=f"{name}: what it reads of a picture", analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        gr.HTML(_heading(name))
        visit = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                picture = gr.Image(
                    type="filepath",
                    label="Picture",
                    sources=["upload", "clipboard"],
                    height=300,
                    buttons=[],
                    alt_text="your picture",
                    elem_id="rc-picture",
                )
                # Decoded by `read_picture`, within limits and in few formats; the component would decode any file.
                setattr(picture, "preprocess", _path_of)  # noqa: B010
            with gr.Column(scale=7, min_width=300):
                question = gr.Textbox(
                    label="Question",
                    placeholder="What do you want to know?",
                    lines=1,
                    max_lines=3,
                    elem_id="rc-question",
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="rc-ask")
                    anew = gr.Button("New conversation", elem_id="rc-new")
                status = gr.HTML(elem_id="rc-status")
                gr.HTML("<h2>Examples</h2>")
                with gr.Row(elem_id="rc-examples"):
                    examples = [
                        gr.Button(text, icon=_icon(seed, folder), size="sm", min_width=220) for seed, text in EXAMPLES
                    ]
        controls, panels = [], []
        with gr.Row(equal_height=False):
            for letter, entry in zip(_COLUMNS, (OWN, OFF), strict=True):
                with gr.Column(min_width=300, elem_id=f"rc-column-{letter}"):
                    chosen = gr.Dropdown(
                        menu.entries(),
                        value=entry,
                        label=f"Settings {letter}",
                        filterable=False,
                        elem_id=f"rc-menu-{letter}",
                    )
                    tokens = gr.Slider(
                        0,
                        menu.most,
                        value=menu.tokens_for(entry, 0),
                        step=1,
                        label=f"Budget {letter}: tokens per picture",
                        info=_info(menu.takes_budget(entry)),
                        interactive=menu.takes_budget(entry) != "none",
                        elem_id=f"rc-budget-{letter}",
                    )
                    controls.append((chosen, tokens))
                    panels.append(gr.HTML(_EMPTY, elem_id=f"rc-panel-{letter}"))
        with gr.Accordion("Heat maps of settings A", open=False):
            heat = gr.HTML(_EMPTY, elem_id="rc-heat")
        with gr.Accordion("The conversation", open=True):
            mode = gr.Radio(
                [(_MODE_WORDS[one], one) for one in MODES[1::-1] + MODES[2:]],
                value="append",
                label="For a later question",
                elem_id="rc-mode",
            )
            log = gr.HTML(elem_id="rc-log")

        settings = [component for pair in controls for component in pair]
        shown = [*panels, heat, log]
        model = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "minimal",
            "api_visibility": "private",
        }
        quick = {"queue": True, "concurrency_limit": 8, "show_progress": "hidden", "api_visibility": "private"}

        def upload(path: str | None) -> tuple[Any, ...]:
            """Begin a conversation about a new picture, or about none."""
            blank = (*[_EMPTY] * 3, "")
            try:
                if path is None:
                    return None, pictures.note(""), *blank
                image = read_picture(path)
            except Refused as error:
                return None, pictures.note(str(error), refused=True), *blank
            note = pictures.note(f"The picture has {image.width} x {image.height} pixels. Ask a question about it.")
            return Visit(image), note, *blank

        def answer(before: Visit | None, text: str, how: str, *chosen: Any) -> tuple[Any, ...]:
            """Ask a further question."""
            try:
                asked = before or Visit()
                if not asked.image:
                    raise Refused("Choose a picture first.")
                asked = dataclasses.replace(asked, questions=[*asked.questions, check_question(text)], mode=how)
                return asked, "", *_answers(talks, asked, chosen)
            except Refused as error:
                return before, gr.skip(), pictures.note(str(error), refused=True), *[gr.skip()] * len(shown)

        def again(before: Visit | None, how: str, *chosen: Any) -> tuple[Any, ...]:
            """Answer the same questions under other settings."""
            if before is None or not before.questions:
                return before, *[gr.skip()] * (1 + len(shown))
            try:
                asked = dataclasses.replace(before, mode=how)
                return asked, *_answers(talks, asked, chosen)
            except Refused as error:
                return before, pictures.note(str(error), refused=True), *[gr.skip()] * len(shown)

        def restart(before: Visit | None) -> tuple[Any, ...]:
            """Forget the questions, keep the picture."""
            return (before and Visit(before.image)), pictures.note("A new conversation begins."), *[_EMPTY] * 3, ""

        def example(number: int) -> Any:
            """A handler that shows an example and asks its question."""
            seed, text = EXAMPLES[number]

            def show(how: str, *chosen: Any) -> tuple[Any, ...]:
                image = draw_scene(seed).image
                asked = Visit(image, [text], how)
                try:
                    return image, asked, *_answers(talks, asked, chosen)
                except Refused as error:
                    note = pictures.note(str(error), refused=True)
                    return image, Visit(image), note, *[_EMPTY] * 3, ""

            return show

        def fit(entry: str, tokens: int) -> Any:
            """Move the slider where an entry wants it."""
            use = menu.takes_budget(entry)
            return gr.Slider(value=menu.tokens_for(entry, tokens), interactive=use != "none", info=_info(use))

        gr.on([picture.upload, picture.clear], upload, picture, [visit, status, *shown], **quick)
        gr.on(
            [ask.click, question.submit],
            answer,
            [visit, question, mode, *settings],
            [visit, question, status, *shown],
            **model,
        )
        anew.click(restart, visit, [visit, status, *shown], **quick)
        for number, button in enumerate(examples):
            button.click(example(number), [mode, *settings], [picture, visit, status, *shown], **model)
        repeat: dict[str, Any] = {
            "fn": again,
            "inputs": [visit, mode, *settings],
            "outputs": [visit, status, *shown],
            **model,
        }
        for chosen, tokens in controls:
            chosen.input(fit, [chosen, tokens], tokens, **quick).then(**repeat)
            tokens.input(trigger_mode="always_last", **repeat)
        mode.input(**repeat)
        gr.HTML(_PRIVACY)
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def _answers(talks: Talks, visit: Visit, chosen: Sequence[Any]) -> tuple[Any, ...]:
    """The status, both panels, the heat maps and the log, for the entries and numbers of both columns."""
    names, asked = {value: label for label, value in talks.menu.entries()}, []
    for letter, entry, tokens in zip(_COLUMNS, chosen[::2], chosen[1::2], strict=True):
        name = f"{letter}: {names.get(entry, 'unknown')}"
        try:
            asked.append((name, talks.ask(visit, entry, int(tokens))))
        except Refused:
            raise
        except Exception as error:
            logger.exception("An answer failed.")
            raise Refused(f"The answer failed ({type(error).__name__}); the server's log says why.") from error
    panels = [pictures.panel(one, talks.processor, name) for name, one in asked]
    heat = pictures.heat_maps(asked[0][1], talks.processor)
    return pictures.note(_verdict(asked)), *panels, heat, pictures.log(asked)


def _verdict(asked: Sequence[tuple[str, Asked]]) -> str:
    """A sentence with both answers and their cost."""
    parts = []
    for (_, one), letter in zip(asked, _COLUMNS, strict=True):
        turn = one.turns[-1]
        cost = f"{turn.visual_tokens:,} visual tokens, {1000 * one.seconds[-1]:,.0f} ms"
        parts.append(f"{letter} answers {turn.answer or 'nothing'} ({cost})")
    return f"{asked[0][1].turns[-1].question} {'; '.join(parts)}."


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _icon(seed: int, folder: Path) -> str:
    file = folder / f"{seed}.png"
    draw_scene(seed).image.resize((48, 48)).save(file)
    return str(file)


def _info(use: str) -> str:
    return {
        "none": "These settings fix the number themselves.",
        "required": "This method needs a number.",
        "optional": "0: the method decides for each picture.",
    }[use]


def _heading(name: str) -> str:
    small = (
        " This small model knows drawn shapes only, and it is too small to save time." if name in CHECKPOINTS else ""
    )
    return (
        f"<h1>What {escape(name)} reads of a picture</h1><p>A LLaVA cuts a picture into patches and reads a token for "
        "each. With recoverable compression it reads only those that stand out or that your question asks about. "
        f"Ask under two settings, A and B, and compare.{small}</p>"
    )


__all__ = ["EXAMPLES", "build_page"]
