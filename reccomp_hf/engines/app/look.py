"""The look of the page: fonts of the reader's machine, and colours with enough contrast in light and dark."""

from __future__ import annotations

import gradio as gr

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's default theme without fonts from the network, in blue."""
    made = gr.themes.Default(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=_SANS, font_mono=_MONO
    )
    return made.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_text_color="white",
    )


CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto;}
.gradio-container h1 {font-size: 1.6rem; margin: 0 0 .25rem;}
.gradio-container h2 {font-size: 1rem; margin: .25rem 0 0;}
.gradio-container h3 {font-size: 1rem; margin: 1rem 0 .25rem;}
:focus-visible {outline: 3px solid #1d4ed8 !important; outline-offset: 2px;}
.dark :focus-visible {outline-color: #93c5fd !important;}
#rc-picture img {width: 100%; height: 100%; object-fit: contain;}
.rc-answer {font-size: 1.5rem; font-weight: 600; margin: 0; overflow-wrap: anywhere;}
.rc-cost {margin: .1rem 0 .35rem;}
.rc-bar {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden;
  margin-bottom: .75rem;}
.rc-bar div {height: 100%; background: #1d4ed8;}
.dark .rc-bar div {background: #93c5fd;}
.rc-figure {margin: 0;}
.rc-figure img {width: 100%; height: auto; max-height: 70vh; object-fit: contain; border-radius: 6px; display: block;}
.rc-figure ul {list-style: none; padding: 0; margin: .4rem 0 0;}
.rc-figure li {display: flex; align-items: center; gap: .5rem; margin: .15rem 0;}
.rc-figure svg {flex: none;}
.rc-pair {display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1rem;}
.rc-scale span {display: inline-block; width: 8rem; height: .7rem; vertical-align: middle; border-radius: 3px;
  background: linear-gradient(90deg, #00224e, #414d6b, #7d7c78, #bcaf6f, #fee838);}
.rc-log {border: 0 !important; width: 100%; border-collapse: collapse; table-layout: fixed;}
.rc-log th:first-child {width: 40%;}
.rc-log th, .rc-log td {text-align: left; vertical-align: top; padding: .4rem .5rem; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary);}
.rc-log table, .rc-log th, .rc-log td, .rc-log tr {border-width: 0 0 1px 0 !important;
  border-color: var(--border-color-primary) !important;}
.rc-back {margin-top: 1rem; border-top: 1px solid var(--border-color-primary);}
.rc-refused {border-left: 4px solid #b91c1c; padding: .4rem .6rem; margin: 0;}
.rc-note {border-left: 4px solid #1d4ed8; padding: .4rem .6rem; margin: 0;}
.rc-empty {color: var(--body-text-color-subdued);}
"""

__all__ = ["CSS", "theme"]
