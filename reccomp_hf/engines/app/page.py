"""The page: its controls, and the handlers that they call."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...demo import CHECKPOINTS, draw_scene
from .choices import OFF, OWN
from .handlers import COLUMNS, EMPTY, EXAMPLES, Handlers
from .limits import MAX_BYTES, MAX_WAITING
from .talks import Talks

_MODE_WORDS = {
    "append": "add what the new question needs",
    "rebuild": "choose again for the new question alone",
    "keep": "keep the first choice",
}
_PRIVACY = (
    f'<p class="rc-empty">A picture may have {MAX_BYTES >> 20} MB. Pictures stay on the machine of this page; '
    "their files are deleted after an hour. A time is that of one call on this machine; with the first question about "
    "a picture it includes the vision tower.</p>"
)
_DELETE = (600, 3600)
"""Seconds between looks for old files, and the age of an old file."""
_PRIVATE = {"api_visibility": "private"}
_MODEL = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal", **_PRIVATE}
_QUICK = {"concurrency_limit": 8, "show_progress": "hidden", **_PRIVATE}


def build_page(talks: Talks, name: str, folder: Path) -> gr.Blocks:
    """The page for a model.

    Args:
        talks: Answers the questions.
        name: Name of the model, for the title.
        folder: A folder of the page's own, for the pictures of the examples.
    """
    handlers = Handlers(talks)
    with gr.Blocks(title=f"{name}: what it reads", analytics_enabled=False, delete_cache=_DELETE) as page:
        visit = gr.State(None)
        gr.HTML(_heading(name))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                picture = _picture()
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
                    restart = gr.Button("New conversation", elem_id="rc-new")
                status = gr.HTML(elem_id="rc-status")
                gr.HTML("<h2>Examples</h2>")
                with gr.Row(elem_id="rc-examples"):
                    examples = [
                        gr.Button(text, icon=_icon(seed, folder), size="sm", min_width=220) for seed, text in EXAMPLES
                    ]
        with gr.Row(equal_height=False):
            columns = [
                _column(handlers, talks, letter, entry) for letter, entry in zip(COLUMNS, (OWN, OFF), strict=True)
            ]
        with gr.Accordion("Heat maps of settings A", open=False):
            heat = gr.HTML(EMPTY, elem_id="rc-heat")
        with gr.Accordion("The conversation", open=True):
            words = [(label, value) for value, label in _MODE_WORDS.items()]
            mode = gr.Radio(words, value="append", label="For a later question", elem_id="rc-mode")
            log = gr.HTML(elem_id="rc-log")
        gr.HTML(_PRIVACY)

        settings = [component for menu, slider, _ in columns for component in (menu, slider)]
        results = [status, *(panel for _, _, panel in columns), heat, log]
        gr.on([picture.upload, picture.clear], handlers.upload, picture, [picture, visit, *results], **_QUICK)
        asks, inputs = [ask.click, question.submit], [visit, question, mode, *settings]
        gr.on(asks, handlers.answer, inputs, [visit, question, *results], **_MODEL)
        restart.click(handlers.restart, visit, [visit, *results], **_QUICK)
        for number, button in enumerate(examples):
            button.click(handlers.example(number), [mode, *settings], [picture, visit, *results], **_MODEL)
        repeat: dict[str, Any] = {
            "fn": handlers.again,
            "inputs": [visit, mode, *settings],
            "outputs": [visit, *results],
            **_MODEL,
        }
        for menu, slider, _ in columns:
            # Not `input`, which a menu also sends when the focus leaves it.
            menu.change(handlers.fit, [menu, slider], slider, **_QUICK).then(**repeat)
            slider.input(trigger_mode="always_last", **repeat)
        mode.input(**repeat)
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def _picture() -> Any:
    """The place of the visitor's picture, which gives handlers the path of its file."""
    picture = gr.Image(
        type="filepath",
        label="Picture",
        sources=["upload", "clipboard"],
        height=300,
        buttons=[],
        alt_text="your picture",
        elem_id="rc-picture",
    )
    # Files are decoded by `read_picture`, within limits and in few formats; the component would decode any of them.
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def _column(handlers: Handlers, talks: Talks, letter: str, entry: str) -> tuple[Any, Any, Any]:
    """A menu of settings, a slider of the budget, and the place of the answer."""
    with gr.Column(min_width=300, elem_id=f"rc-column-{letter}"):
        menu = gr.Dropdown(
            talks.menu.entries(),
            value=entry,
            label=f"Settings {letter}",
            filterable=False,
            elem_id=f"rc-menu-{letter}",
        )
        slider = gr.Slider(
            0,
            talks.menu.most,
            value=talks.menu.tokens_for(entry, 0),
            step=1,
            label=f"Budget {letter}: tokens per picture",
            elem_id=f"rc-budget-{letter}",
            **handlers.slider(entry),
        )
        return menu, slider, gr.HTML(EMPTY, elem_id=f"rc-panel-{letter}")


def _icon(seed: int, folder: Path) -> str:
    file = folder / f"{seed}.png"
    draw_scene(seed).image.resize((48, 48)).save(file)
    return str(file)


def _heading(name: str) -> str:
    small = (
        " This small model knows drawn shapes only, and it is too small to save time." if name in CHECKPOINTS else ""
    )
    return (
        f"<h1>What {escape(name)} reads of a picture</h1><p>A LLaVA cuts a picture into patches and reads a token for "
        "each. With recoverable compression it reads only those that stand out or that your question asks about. "
        f"Ask under two settings, A and B, and compare.{small}</p>"
    )


__all__ = ["build_page"]
