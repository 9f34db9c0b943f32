"""Overlay plots of token recovery: which patches were kept, and why, and where the others went."""

from __future__ import annotations

import colorsys
import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ..core.features import TokenRecoveryOutput
from ..core.methods.registry import get_method
from .regions import Region, regions_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "visual": (86, 180, 233),
    "text": (230, 159, 0),
    "coverage": (0, 200, 150),
    "centre": (240, 120, 190),
}
"""Colours (red, green, blue) of a kept patch's frame by the reason it was kept, and of a merged token's centre.

They are close to the palette of Okabe and Ito, which people with any colour vision can tell apart, and frames differ
in their lines too: double for "visual", single for "text", corners for "coverage".
"""

_WORDS = {
    "visual": ("stands out in the picture", "stand out in the picture"),
    "text": ("fits the question", "fit the question"),
    "coverage": ("kept to cover the picture", "kept to cover the picture"),
    "merged": ("average of a tinted area (at its dot)", "averages of tinted areas (at the dots)"),
    "dropped": ("patch not read at all", "patches not read at all"),
}
_VISUAL_WORDS = {"random": "drawn at random", "base_tile": "of the overview tile"}
_SHARED = "in several of the averages, or in none"
_PANEL = 3.3  # inches
_WRITING = 1.45  # inches above and below a panel
_MOST_ACROSS = 4  # panels
_CELL = 28  # pixels of a patch, fewer where there are many of them
_WIDEST_CANVAS = 1000  # pixels

# Markers of the legend, in a square of side 2.
_SQUARE = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]
_INNER = [(x / 2, y / 2) for x, y in _SQUARE]
_CORNERS = [point for x in (-1, 1) for y in (-1, 1) for point in ((x, y / 3), (x, y), (x / 3, y))]

_Pixels = npt.NDArray[np.uint8]


def plot_recovery(
    image: Image.Image,
    record: TokenRecoveryOutput | Sequence[TokenRecoveryOutput],
    *,
    processor: Any = None,
    questions: str | Sequence[str] | None = None,
    answers: str | Sequence[str] | None = None,
    method: str = "recoverable",
    title: str = "",
) -> Figure:
    """Show which patches of an image the language model reads, and where the others went.

    A panel for each question, and the image itself behind them. Bright patches in a frame are read as they are, and
    the frame gives the reason (see `COLORS`). Areas of one tint were averaged into one token, whose place is the dot.
    Grey patches were dropped.

    Args:
        image: The image as passed to the processor.
        record: The output of `model.recover` for the image, or a list of them for several questions about it.
        processor: The model's processor, whose settings define how the image is scaled and cropped. Without it the
            image is cropped to its middle square, as CLIP does; LLaVA-NeXT's tiles need a processor.
        questions: One question for each record, written above its panel.
        answers: One answer for each record, written below its question.
        method: `token_recovery.method`, if it is not the paper's; it changes the wording of the legend.
        title: A line above all panels, the name of the model and its settings perhaps.

    Returns:
        A matplotlib figure; `figure.savefig("name.png")` writes it. pyplot is not used.

    Raises:
        ValueError: The number of questions or answers differs from that of the records, or tiles without a processor.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    records = [record] if isinstance(record, TokenRecoveryOutput) else list(record)
    titles = _one_per_record("questions", questions, len(records))
    replies = _one_per_record("answers", answers, len(records))
    regions = regions_of(image.convert("RGB"), records, processor)
    plain = draw_regions(regions)
    panels = 1 + len(records)
    # A tiled image is wide and gets a row of its own.
    across = _columns(panels) if plain.width < 1.6 * plain.height else 1
    down = -(-panels // across)
    width = _PANEL * (1 if across > 1 else 2.2)
    height = width * plain.height / plain.width
    figure = Figure(figsize=(width * across, (height + _WRITING) * down), dpi=110, layout="constrained")
    axes = [figure.add_subplot(down, across, number + 1) for number in range(panels)]
    total = sum(int((region.patches >= 0).sum()) for region in regions)
    for axis, one, question, reply in zip(axes, records, titles, replies, strict=False):
        tokens = int(one.counts.sum())
        lines = [f"answer: {_drawable(textwrap.shorten(reply, 60))}"] if reply else []
        _show(
            axis,
            draw_regions(regions, one),
            [question, *lines, f"reads {tokens} of {total} tokens ({tokens / total:.0%})"],
        )
        _legend(axis, one, total, method)
    _show(axes[-1], plain, ["The picture as the model sees it", f"{total} patches, a token each"])
    place: tuple[Any, float] = (axes[-1], -0.02)
    if panels < down * across:
        place = (figure.add_subplot(down, across, panels + 1), 1)
        place[0].set_axis_off()
    place[0].text(
        0, place[1], _explanation(records), fontsize=8, color="dimgrey", va="top", transform=place[0].transAxes
    )
    for axis in axes:
        _name_regions(axis, regions)
    if title:
        figure.suptitle(_drawable(title), fontsize=9, color="dimgrey", x=0.01, ha="left")
    return figure


def _explanation(records: Sequence[TokenRecoveryOutput]) -> str:
    tinted = ", tinted\nareas as one average each" if any(one.stage_counts()["merged"] for one in records) else ""
    return (
        "The picture is cut into patches, and the language\nmodel reads a token for each. Compression lets it\n"
        f"read fewer: the framed patches as they are{tinted},\ngrey ones not at all."
    )


def _columns(panels: int) -> int:
    """Panels per row: as many as fit, with the fewest places of the last row left empty."""
    if panels <= _MOST_ACROSS:
        return panels
    return min(range(_MOST_ACROSS, 1, -1), key=lambda across: -panels % across)


def _one_per_record(name: str, texts: str | Sequence[str] | None, count: int) -> list[str]:
    texts = [""] * count if texts is None else [texts] if isinstance(texts, str) else list(texts)
    if len(texts) != count:
        raise ValueError(f"There must be one of {name} for each of the {count} records, got {len(texts)}.")
    return texts


# ---- drawing -------------------------------------------------------------------------------------------------------


def draw_regions(regions: Sequence[Region], record: TokenRecoveryOutput | None = None) -> Image.Image:
    """All regions of an image side by side, see [`regions_of`], with the marks of a record if one is given."""
    cell = _cell_size(regions)
    parts = [_mark_region(region, record, cell) for region in regions]
    width = sum(part.width for part in parts) + cell * (len(parts) - 1)
    canvas = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + cell
    return canvas


def _cell_size(regions: Sequence[Region]) -> int:
    columns = sum(region.patches.shape[1] for region in regions) + len(regions) - 1
    return max(12, min(_CELL, _WIDEST_CANVAS // columns))


def _mark_region(region: Region, record: TokenRecoveryOutput | None, cell: int) -> Image.Image:
    """A region, enlarged to `cell` pixels per patch, with the marks of a record."""
    rows, columns = region.patches.shape
    picture = region.picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    if record is None:
        return _draw_grid(picture, rows, columns, cell)
    of_kinds, of_clusters, of_centres = _patch_kinds(record)
    kinds, clusters, centres = of_kinds[region.patches], of_clusters[region.patches], of_centres[region.patches]
    shaded = _shade(np.asarray(picture), kinds, clusters, cell)
    picture = Image.fromarray(shaded)
    draw = ImageDraw.Draw(picture)
    _draw_borders(draw, np.where(kinds == "merged", clusters, -1), cell)
    thick = max(2, cell // 9)
    for row, column in itertools.product(range(rows), range(columns)):
        box = (column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1)
        if centres[row, column]:
            middle, reach = (box[0] + cell / 2, box[1] + cell / 2), cell / 4
            around = (middle[0] - reach, middle[1] - reach, middle[0] + reach, middle[1] + reach)
            draw.ellipse(around, fill=COLORS["centre"], outline="white", width=max(1, cell // 14))
        elif kinds[row, column] in COLORS:
            _draw_frame(draw, box, kinds[row, column], thick)
    return picture


def _patch_kinds(
    record: TokenRecoveryOutput,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The kind of every patch, its merged token (-1 for none), and the centres, all counted over all tiles."""
    clusters = record.cluster.cpu().numpy()
    kinds = np.where(clusters >= 0, "merged", "dropped").astype("U8")
    for name in ("visual", "text", "coverage"):
        kinds[getattr(record, f"{name}_mask").cpu().numpy()] = name
    tile = np.arange(len(clusters))[:, None] * (clusters.max() + 1)
    clusters = np.where(kinds == "merged", clusters + tile, -1)
    return kinds.flatten(), clusters.flatten(), record.centre_mask.cpu().numpy().flatten()


def _shade(pixels: _Pixels, kinds: npt.NDArray[Any], clusters: npt.NDArray[np.int64], cell: int) -> _Pixels:
    """Kept patches unchanged, merged ones faint and tinted by their cluster, dropped ones dim and grey."""
    grey = np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape)
    tints = np.zeros((*clusters.shape, 3))
    for cluster in np.unique(clusters[clusters >= 0]):
        tints[clusters == cluster] = _tint(int(cluster))

    def enlarged(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.repeat(cell, 0).repeat(cell, 1)

    merged, dropped = (enlarged(kinds == name)[..., None] for name in ("merged", "dropped"))
    result = np.where(merged, 0.22 * pixels + 0.1 * grey + 0.26 * enlarged(tints), pixels)
    result = np.where(dropped, 0.05 * pixels + 0.42 * grey, result)
    return result.clip(0, 255).astype(np.uint8)


def _tint(cluster: int) -> tuple[float, ...]:
    """A colour for a cluster, far from those of clusters with neighbouring numbers."""
    return tuple(255 * part for part in colorsys.hsv_to_rgb(cluster * 0.618034 % 1, 0.55, 0.9))


def _draw_frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], kind: str, thick: int) -> None:
    """The frame of a kept patch, in the lines of its kind."""
    left, top, right, bottom = box
    color = COLORS[kind]
    if kind != "coverage":
        draw.rectangle(box, outline=color, width=thick)
        if kind == "visual":
            inner = 2 * thick - thick // 2
            edges = (left + inner, top + inner, right - inner, bottom - inner)
            draw.rectangle(edges, outline=color, width=max(1, thick // 2))
        return
    reach = (right - left + 1) // 3
    for x, across in ((left, 1), (right, -1)):
        for y, along in ((top, 1), (bottom, -1)):
            for end in ((x + across * reach, y + along * (thick - 1)), (x + across * (thick - 1), y + along * reach)):
                corners = sorted((x, end[0])), sorted((y, end[1]))
                draw.rectangle((corners[0][0], corners[1][0], corners[0][1], corners[1][1]), fill=color)


def _draw_borders(draw: ImageDraw.ImageDraw, clusters: npt.NDArray[np.int64], cell: int) -> None:
    """A light line wherever two merged areas meet."""
    both = (clusters[:, 1:] >= 0) & (clusters[:, :-1] >= 0)
    for row, column in np.argwhere(both & (clusters[:, 1:] != clusters[:, :-1])).tolist():
        draw.line(((column + 1) * cell, row * cell, (column + 1) * cell, (row + 1) * cell), fill=(225, 225, 225))
    both = (clusters[1:] >= 0) & (clusters[:-1] >= 0)
    for row, column in np.argwhere(both & (clusters[1:] != clusters[:-1])).tolist():
        draw.line((column * cell, (row + 1) * cell, (column + 1) * cell, (row + 1) * cell), fill=(225, 225, 225))


def _draw_grid(picture: Image.Image, rows: int, columns: int, cell: int) -> Image.Image:
    lines = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(lines)
    for row in range(1, rows):
        draw.line((0, row * cell, picture.width, row * cell), fill=70)
    for column in range(1, columns):
        draw.line((column * cell, 0, column * cell, picture.height), fill=70)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture, lines)


# ---- texts ---------------------------------------------------------------------------------------------------------


def legend_lines(record: TokenRecoveryOutput, total: int, method: str) -> list[tuple[str, str]]:
    """The marks of a record that occur, in plain words with their counts.

    Args:
        record: The record of an image.
        total: Number of the image's patches, padding excluded.
        method: `token_recovery.method`.

    Returns:
        Pairs of a mark and its line; a mark is `"visual"`, `"text"`, `"coverage"`, `"merged"` or `"dropped"`, and `""`
        for a remark.
    """
    counts = {**record.stage_counts(), "dropped": total - int((record.cluster >= 0).sum())}
    lines = []
    if record.text_similarity is not None and counts["coverage"] and not counts["text"]:
        lines.append(("", "no patch stands out for the question"))
    for name, count in counts.items():
        if not count:
            continue
        words = _WORDS[name][count != 1]
        words = _VISUAL_WORDS.get(method, words) if name == "visual" else words
        words = _SHARED if name == "dropped" and get_method(method).shares_patches else words
        lines.append((name, f"{count} {words}"))
    return lines


def _show(axis: Any, canvas: Image.Image, title: Sequence[str]) -> None:
    """Put a canvas into a panel, the first line of the title in bold."""
    axis.imshow(np.asarray(canvas), interpolation="antialiased")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    first, *rest = title
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("\n".join(rest), fontsize=8.5, loc="left", linespacing=1.35)
    axis.set_title(textwrap.fill(_drawable(first), 40), fontsize=9.5, fontweight="bold", loc="left")


def _drawable(text: str) -> str:
    """The text for matplotlib, or a sentence where its font lacks one of the characters and would draw boxes.

    A dollar sign is escaped: between two of them matplotlib reads a formula.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    if all(font.get_char_index(ord(character)) or character.isspace() for character in text):
        return text.replace("$", r"\$")
    return "(a text whose script the font of this plot lacks)"


def _legend(axis: Any, record: TokenRecoveryOutput, total: int, method: str) -> None:
    """Explain the marks in plain words with their counts; marks that do not occur are left out."""
    from matplotlib.lines import Line2D
    from matplotlib.path import Path

    double = Path(_SQUARE + _INNER, [1, 2, 2, 2, 79] * 2)
    corners = Path(_CORNERS, [1, 2, 2] * 4)
    markers: dict[str, Any] = {"visual": double, "text": "s", "coverage": corners}
    handles = []
    for name, label in legend_lines(record, total, method):
        if not name:
            handles.append(Line2D([], [], linestyle="none", label=label))
            continue
        look: dict[str, Any] = {"marker": markers.get(name, "s"), "markersize": 9, "markerfacecolor": "none"}
        if name == "merged":
            look |= {"marker": "o", "markerfacecolor": _unit(COLORS["centre"]), "markeredgewidth": 0}
        elif name == "dropped":
            look |= {"markerfacecolor": "#6e6e6e", "markeredgecolor": "#6e6e6e"}
        else:
            look |= {"markeredgecolor": _unit(COLORS[name]), "markeredgewidth": 1.4 if name == "visual" else 2.2}
        handles.append(Line2D([], [], linestyle="none", label=label, **look))
    axis.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.02, 0.0),
        borderpad=0.1,
        handletextpad=0.2,
        labelspacing=0.35,
        fontsize=8,
        frameon=False,
    )


def _unit(color: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in color)


def _name_regions(axis: Any, regions: Sequence[Region]) -> None:
    """Write the names of several regions into their upper left corners."""
    cell, left = _cell_size(regions), 0
    for region in regions if len(regions) > 1 else ():
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
        axis.text(left + 4, 4, region.name, fontsize=7, va="top", bbox=box)
        left += (region.patches.shape[1] + 1) * cell


__all__ = ["COLORS", "draw_regions", "legend_lines", "plot_recovery"]
