"""The HTML of the page: answers with their cost, pictures with their marks, and heat maps."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...measure.plot import COLORS, draw_regions, legend_lines
from ...measure.regions import Region, regions_of
from .choices import OFF
from .talks import Asked

_QUALITY = 88  # of WebP
_GREY = (110, 110, 110)
_MODES = {
    "append": "Only the tokens that this question chose and the conversation lacked were added.",
    "rebuild": "The conversation was read again, with tokens chosen for this question alone.",
    "keep": "No token was added: the first choice stays.",
}
_SALIENCY = "How strongly the class token of the vision tower attends to each patch: what stands out in the picture."
_RELEVANCE = "How similar CLIP finds each patch to the question: what the question asks about."


def panel(asked: Asked, processor: Any, name: str) -> str:
    """The last answer under some settings: its cost, the patches that were read, and those that came back.

    Args:
        asked: The conversation.
        processor: The model's processor.
        name: Name of the settings.
    """
    turn, total = asked.turns[-1], asked.most
    share = turn.visual_tokens / total
    parts = [
        f'<p class="rc-answer">{escape(turn.answer) or "<em>an empty answer</em>"}</p>',
        f'<p class="rc-cost"><strong>{turn.visual_tokens:,}</strong> of {total:,} visual tokens '
        f"({share:.0%}), <strong>{1000 * asked.seconds[-1]:,.0f} ms</strong></p>",
        f'<div class="rc-bar"><div style="width:{100 * min(share, 1):.1f}%"></div></div>',
    ]
    record = turn.records[0]
    regions = regions_of(asked.image, [record], processor)
    if asked.method == OFF:
        patches = _patches(regions)
        parts.append(
            _figure(
                draw_regions(regions), "the picture as the model sees it", [("", f"all {patches:,} patches are read")]
            )
        )
    else:
        lines = legend_lines(record, _patches(regions), asked.method)
        later = len(asked.turns) > 1
        if later and asked.mode == "append":  # tokens of earlier questions are read too
            lines = [(mark, line.replace("not read at all", "not chosen for it")) for mark, line in lines]
        which = "the first" if later and asked.mode == "keep" else "this"
        title = f"Chosen for {which} question: {int(record.counts.sum()):,} tokens"
        parts.append(_figure(draw_regions(regions, record), f"the patches chosen for {which} question", lines, title))
        if later:
            parts.append(_came_back(asked, regions))
    return f'<section class="rc-panel" aria-label="Answer with {escape(name)}">{"".join(parts)}</section>'


def _came_back(asked: Asked, regions: Sequence[Region]) -> str:
    """The patches of the last question that earlier ones did not choose, next to those that they did."""
    masks = [turn.records[0].kept_mask for turn in asked.turns]
    earlier = masks[-2] if asked.mode == "rebuild" else torch.stack(masks[:-1]).any(0)
    new = masks[-1] & ~earlier
    record, nothing = asked.turns[-1].records[0], torch.zeros_like(new)
    marks = dataclasses.replace(
        record,
        visual_mask=earlier,
        text_mask=new,
        coverage_mask=nothing,
        centre_mask=nothing,
        cluster=torch.full_like(record.cluster, -1),
    )
    count, before = int(new.sum()), int(earlier.sum())
    which = "the question before" if asked.mode == "rebuild" else "earlier questions"
    lines = [("text", f"{count} came back for this question"), ("visual", f"{before} chosen for {which}")]
    lines.append(("", _MODES[asked.mode]))
    title = f"What came back: {count} {'patch' if count == 1 else 'patches'}"
    picture = _figure(draw_regions(regions, marks), "the patches that came back for this question", lines, title)
    return f'<div class="rc-back">{picture}</div>'


def heat_maps(asked: Asked, processor: Any) -> str:
    """Saliency and relevance of every patch for the last question."""
    record = asked.turns[-1].records[0]
    regions = regions_of(asked.image, [record], processor)
    saliency = _figure(_heat(regions, record.saliency), "saliency of every patch", [("", _SALIENCY)], "Saliency")
    if record.text_similarity is None:
        relevance = "<p>These settings do not read the question.</p>"
    else:
        heat = _heat(regions, record.text_similarity)
        relevance = _figure(heat, "relevance of every patch", [("", _RELEVANCE)], "Relevance")
    scale = '<p class="rc-scale">low <span></span> high, each map by its own range</p>'
    return f'<div class="rc-pair">{saliency}{relevance}</div>{scale}'


def _heat(regions: Sequence[Region], values: torch.Tensor) -> Image.Image:
    """The picture in grey under the colours of cividis, which people with any colour vision read the same way."""
    from matplotlib import colormaps

    scores = values.flatten().float().cpu().numpy()
    read = np.concatenate([scores[region.patches[region.patches >= 0]] for region in regions])
    low, high = np.percentile(read, [2, 98])
    shares = ((scores - low) / max(high - low, 1e-12)).clip(0, 1)
    canvases = []
    for region in regions:
        canvas = draw_regions([region]).convert("L").convert("RGB")
        colors = (255 * colormaps["cividis"](shares[region.patches])[..., :3]).astype(np.uint8)
        heat = Image.fromarray(colors).resize(canvas.size, Image.Resampling.NEAREST)
        canvases.append(Image.blend(canvas, heat, 0.72))
    gap = 12
    width = sum(canvas.width for canvas in canvases) + gap * (len(canvases) - 1)
    joined, left = Image.new("RGB", (width, max(canvas.height for canvas in canvases)), "white"), 0
    for canvas in canvases:
        joined.paste(canvas, (left, 0))
        left += canvas.width + gap
    return joined


def log(answers: Sequence[tuple[str, Asked]]) -> str:
    """The conversation: every question with the answers under the settings, their tokens and what came back."""
    if not answers or not answers[0][1].turns:
        return ""
    rows = []
    for number, turn in enumerate(answers[0][1].turns):
        cells = []
        for _, asked in answers:
            one = asked.turns[number]
            back = f", {one.recovered} came back" if number and asked.mode != "keep" else ""
            cells.append(f"<td>{escape(one.answer) or '-'}<br><small>{one.visual_tokens:,} tokens{back}</small></td>")
        rows.append(f'<tr><th scope="row">{escape(turn.question)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(name.partition(":")[0])}</th>' for name, _ in answers)
    head = f'<tr><th scope="col">question</th>{heads}</tr>'
    return f'<table class="rc-log"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _patches(regions: Sequence[Region]) -> int:
    return sum(int((region.patches >= 0).sum()) for region in regions)


def _figure(image: Image.Image, alt: str, lines: Sequence[tuple[str, str]], title: str = "") -> str:
    """A picture with its description in words, and a line for each of its marks."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    words = "; ".join(line for _, line in lines)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    items = "".join(f"<li>{_swatch(mark)}{escape(line)}</li>" for mark, line in lines)
    return (
        f'<figure class="rc-figure">{heading}<img src="data:image/webp;base64,{data}" width="{image.width}" '
        f'height="{image.height}" alt="{escape(f"{alt}: {words}")}">'
        f"<figcaption><ul>{items}</ul></figcaption></figure>"
    )


def _swatch(mark: str) -> str:
    """A mark as the picture shows it: frames differ in their lines, not in their colours alone."""
    if not mark:
        return ""
    color = "rgb{}".format(COLORS.get("centre" if mark == "merged" else mark, _GREY))
    shapes = {
        "visual": '<rect x="1.5" y="1.5" width="15" height="15"/><rect x="5" y="5" width="8" height="8"/>',
        "text": '<rect x="2" y="2" width="14" height="14" stroke-width="3"/>',
        "coverage": '<path d="M2 7V2h5M11 2h5v5M16 11v5h-5M7 16H2v-5" stroke-width="3"/>',
        "merged": f'<circle cx="9" cy="9" r="5" fill="{color}"/>',
        "dropped": f'<rect x="3" y="3" width="12" height="12" fill="{color}"/>',
    }
    return (
        '<svg aria-hidden="true" width="18" height="18" viewBox="0 0 18 18" fill="none" '
        f'stroke="{color}" stroke-width="1.5">{shapes[mark]}</svg>'
    )


def note(text: str, *, refused: bool = False) -> str:
    """A sentence for the visitor, which a screen reader speaks at once."""
    kind = "rc-refused" if refused else "rc-note"
    return f'<p class="{kind}" role="{"alert" if refused else "status"}">{escape(text)}</p>' if text else ""


__all__ = ["heat_maps", "log", "note", "panel"]
