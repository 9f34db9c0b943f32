"""Pictures of what token recovery did: which patches were kept, and why, and where the others went."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from ..core.features import TokenRecoveryOutput
from ..core.methods.registry import get_method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "visual": (30, 144, 255),
    "text": (255, 150, 0),
    "coverage": (60, 215, 110),
    "centre": (255, 80, 200),
}
"""Frame of a kept patch by the reason it was kept, and the dot of a merged token's centre: red, green, blue."""

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
_PANELS_ACROSS = 3
_CELL = 28  # pixels of a patch, fewer where there are many of them
_WIDEST_CANVAS = 1000  # pixels

_Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass
class _Region:
    """A part of the picture as the model sees it, and the patch that each cell of its grid is."""

    picture: Image.Image
    patches: npt.NDArray[np.int64]  # (rows, columns), counted over all tiles of the image
    name: str


def plot_recovery(
    image: Image.Image,
    record: TokenRecoveryOutput | Sequence[TokenRecoveryOutput],
    *,
    processor: Any = None,
    questions: str | Sequence[str] | None = None,
    answers: str | Sequence[str] | None = None,
    method: str = "recoverable",
) -> Figure:
    """Show which patches of a picture the language model reads, and where the others went.

    Bright patches in a frame are read as they are, the frame's colour says why (see `COLORS`); areas of one tint were
    averaged into one token, which stands at the dot; what is dark was left out.

    Args:
        image: The picture as it was given to the processor.
        record: What `model.recover` returned for it, or several of them, for as many questions on the same picture.
        processor: The model's processor, by whose settings the picture is scaled and cut. Without it a picture is
            scaled and cut to its middle square, as CLIP does; LLaVA-NeXT's tiles need it.
        questions: One for each record, written above its panel.
        answers: One for each record, written below its question.
        method: `token_recovery.method`, where it is not the paper's: it changes the legend's words.

    Returns:
        A matplotlib figure; `figure.savefig("name.png")` writes it. pyplot is not touched.

    Raises:
        ValueError: Questions or answers that are not one per record; tiles without a processor.
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    records = [record] if isinstance(record, TokenRecoveryOutput) else list(record)
    titles = _one_each("questions", questions, len(records))
    replies = _one_each("answers", answers, len(records))
    regions = _regions(image.convert("RGB"), records, processor)
    plain = _canvas(regions, None)
    panels = 1 + len(records)
    # Side by side where it fits, in rows of about equal length; a picture of tiles is wide and gets a line of its own.
    down = -(-panels // (_PANELS_ACROSS if plain.width < 1.6 * plain.height else 1))
    across = -(-panels // down)
    width = _PANEL * (1 if across > 1 else 2.2)
    height = width * plain.height / plain.width
    figure = Figure(figsize=(width * across, (height + _WRITING) * down), dpi=110, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    total = sum(int((region.patches >= 0).sum()) for region in regions)
    _show(axes[0], plain, ["The picture as the model sees it", f"{total} patches, a token each"])
    axes[0].text(0, -0.02, _EXPLANATION, fontsize=8, color="dimgrey", va="top", transform=axes[0].transAxes)
    for axis, one, title, reply in zip(axes[1:], records, titles, replies, strict=False):
        tokens = int(one.counts.sum())
        said = [f"answer: {textwrap.shorten(reply, 60)}"] if reply else []
        _show(axis, _canvas(regions, one), [title, *said, f"reads {tokens} of {total} tokens ({tokens / total:.0%})"])
        _legend(axis, _counts(one, total), method)
    for axis in axes[panels:]:
        axis.set_axis_off()
    _name_regions(axes[0], regions)
    return figure


_EXPLANATION = (
    "The picture is cut into patches, and the language\n"
    "model reads a token for each. Compression lets it\n"
    "read fewer: the framed patches as they are, tinted\n"
    "areas as one average each, dark ones not at all."
)


def _one_each(name: str, texts: str | Sequence[str] | None, count: int) -> list[str]:
    texts = [""] * count if texts is None else [texts] if isinstance(texts, str) else list(texts)
    if len(texts) != count:
        raise ValueError(f"{name} must be one for each of the {count} records, got {len(texts)}.")
    return texts


# ---- the picture as the model sees it ------------------------------------------------------------------------------


def _regions(image: Image.Image, records: Sequence[TokenRecoveryOutput], processor: Any) -> list[_Region]:
    """One region for LLaVA-1.5; for LLaVA-NeXT the base tile, and the other tiles put together and unpadded."""
    tiles, patches = records[0].cluster.shape
    side = int(patches**0.5)
    for record in records:
        if record.cluster.shape != records[0].cluster.shape or side * side != patches:
            raise ValueError(
                f"Records must be of one picture with a square grid of patches, got cluster of shapes "
                f"{[tuple(one.cluster.shape) for one in records]}."
            )
    if processor is None:
        if tiles > 1:
            raise ValueError(f"The record has {tiles} tiles: pass processor= so that they can be put in their places.")
        return [_Region(_middle_square(image), _raster(side), "")]
    pictures = _seen(image, processor)
    if len(pictures) < tiles:
        raise ValueError(f"The record has {tiles} tiles, but the processor makes {len(pictures)} of this picture.")
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if not pinpoints:
        return [_Region(pictures[0], _raster(side), "")]
    base = _Region(pictures[0], _raster(side), "overview")
    return [base, *_detail(image, pictures[1:tiles], side, pinpoints)]


def _raster(side: int) -> npt.NDArray[np.int64]:
    return np.arange(side * side).reshape(side, side)


def _middle_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _seen(image: Image.Image, processor: Any) -> list[Image.Image]:
    """The tiles that the processor's own scaling and cutting makes, before colours are normalised."""
    settings = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
    values = processor.image_processor(images=image, **settings)["pixel_values"]
    values = torch.as_tensor(np.asarray(values)).flatten(0, -4)  # (tiles, 3, height, width)
    tiles = values.permute(0, 2, 3, 1).clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(tile) for tile in tiles]


def _detail(image: Image.Image, pictures: list[Image.Image], side: int, pinpoints: Any) -> list[_Region]:
    """The tiles behind the base tile in their places, without the padding; nothing where none of it is read."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    size, tile = (image.height, image.width), pictures[0].width
    down, across = get_anyres_image_grid_shape(size, pinpoints, tile)
    whole = Image.new("RGB", (across * tile, down * tile))
    cells = np.empty((down * side, across * side), dtype=np.int64)
    for number, picture in enumerate(pictures[: down * across]):
        row, column = divmod(number, across)
        whole.paste(picture, (column * tile, row * tile))
        place = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        cells[place] = _raster(side) + (number + 1) * side * side
    visible = unpad_image(torch.from_numpy(cells)[None], size)[0].numpy()
    if visible.size == 0:
        return []
    top, left = (int(index[0]) for index in np.where(cells == visible[0, 0]))
    rows, columns = visible.shape
    patch = tile / side
    edges = (left * patch, top * patch, (left + columns) * patch, (top + rows) * patch)
    x, y, right, bottom = map(round, edges)
    return [_Region(whole.crop((x, y, right, bottom)), visible, "details")]


# ---- drawing -------------------------------------------------------------------------------------------------------


def _canvas(regions: Sequence[_Region], record: TokenRecoveryOutput | None) -> Image.Image:
    """All regions side by side, marked if there is a record."""
    cell = _cell_size(regions)
    parts = [_marked(region, record, cell) for region in regions]
    width = sum(part.width for part in parts) + cell * (len(parts) - 1)
    canvas = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + cell
    return canvas


def _cell_size(regions: Sequence[_Region]) -> int:
    columns = sum(region.patches.shape[1] for region in regions) + len(regions) - 1
    return max(12, min(_CELL, _WIDEST_CANVAS // columns))


def _marked(region: _Region, record: TokenRecoveryOutput | None, cell: int) -> Image.Image:
    """A region, enlarged to `cell` pixels a patch, with the marks of a record."""
    rows, columns = region.patches.shape
    picture = region.picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    if record is None:
        return _with_grid(picture, rows, columns, cell)
    of_kinds, of_clusters, of_centres = _of_patches(record)
    kinds, clusters, centres = of_kinds[region.patches], of_clusters[region.patches], of_centres[region.patches]
    shaded = _shaded(np.asarray(picture), kinds, clusters, cell)
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
            draw.rectangle(box, outline=COLORS[kinds[row, column]], width=thick)
    return picture


def _of_patches(record: TokenRecoveryOutput) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Of every patch, counted over all tiles: what became of it, its merged token (-1 for none), and the centres."""
    clusters = record.cluster.cpu().numpy()
    kinds = np.where(clusters >= 0, "merged", "dropped").astype("U8")
    for name in ("visual", "text", "coverage"):
        kinds[getattr(record, f"{name}_mask").cpu().numpy()] = name
    tile = np.arange(len(clusters))[:, None] * (clusters.max() + 1)
    clusters = np.where(kinds == "merged", clusters + tile, -1)
    return kinds.flatten(), clusters.flatten(), record.centre_mask.cpu().numpy().flatten()


def _shaded(pixels: _Pixels, kinds: npt.NDArray[Any], clusters: npt.NDArray[np.int64], cell: int) -> _Pixels:
    """Kept patches as they are, merged ones faint and tinted by their cluster, dropped ones dark."""
    grey = np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape)
    tints = np.zeros((*clusters.shape, 3))
    for cluster in np.unique(clusters[clusters >= 0]):
        tints[clusters == cluster] = _tint(int(cluster))

    def enlarged(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.repeat(cell, 0).repeat(cell, 1)

    merged, dropped = (enlarged(kinds == name)[..., None] for name in ("merged", "dropped"))
    result = np.where(merged, 0.22 * pixels + 0.1 * grey + 0.26 * enlarged(tints), pixels)
    result = np.where(dropped, 0.16 * pixels + 0.08 * grey, result)
    return result.clip(0, 255).astype(np.uint8)


def _tint(cluster: int) -> tuple[float, ...]:
    """A colour for a cluster, far from those of the clusters with numbers next to it."""
    return tuple(255 * part for part in colorsys.hsv_to_rgb(cluster * 0.618034 % 1, 0.55, 0.9))


def _draw_borders(draw: ImageDraw.ImageDraw, clusters: npt.NDArray[np.int64], cell: int) -> None:
    """A light line wherever two merged areas meet."""
    both = (clusters[:, 1:] >= 0) & (clusters[:, :-1] >= 0)
    for row, column in np.argwhere(both & (clusters[:, 1:] != clusters[:, :-1])).tolist():
        draw.line(((column + 1) * cell, row * cell, (column + 1) * cell, (row + 1) * cell), fill=(225, 225, 225))
    both = (clusters[1:] >= 0) & (clusters[:-1] >= 0)
    for row, column in np.argwhere(both & (clusters[1:] != clusters[:-1])).tolist():
        draw.line((column * cell, (row + 1) * cell, (column + 1) * cell, (row + 1) * cell), fill=(225, 225, 225))


def _with_grid(picture: Image.Image, rows: int, columns: int, cell: int) -> Image.Image:
    lines = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(lines)
    for row in range(1, rows):
        draw.line((0, row * cell, picture.width, row * cell), fill=70)
    for column in range(1, columns):
        draw.line((column * cell, 0, column * cell, picture.height), fill=70)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture, lines)


# ---- words ---------------------------------------------------------------------------------------------------------


def _counts(record: TokenRecoveryOutput, total: int) -> dict[str, int]:
    """Kept tokens by reason, merged tokens, and patches that are in neither."""
    return {**record.stage_counts(), "dropped": total - int((record.cluster >= 0).sum())}


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
    axis.set_title(textwrap.fill(first, 40), fontsize=9.5, fontweight="bold", loc="left")


def _legend(axis: Any, counts: dict[str, int], method: str) -> None:
    """The marks in plain words with their counts; what does not occur is left out."""
    from matplotlib.lines import Line2D

    handles = []
    for name, count in counts.items():
        if not count:
            continue
        words = _WORDS[name][count != 1]
        words = _VISUAL_WORDS.get(method, words) if name == "visual" else words
        words = _SHARED if name == "dropped" and get_method(method).shares_patches else words
        look: dict[str, Any] = {"marker": "s", "markersize": 9, "markerfacecolor": "white", "markeredgewidth": 2.2}
        if name == "merged":
            look |= {"marker": "o", "markerfacecolor": _unit(COLORS["centre"]), "markeredgewidth": 0}
        elif name == "dropped":
            look |= {"markerfacecolor": "#2a2a2a", "markeredgecolor": "#2a2a2a"}
        else:
            look |= {"markeredgecolor": _unit(COLORS[name])}
        handles.append(Line2D([], [], linestyle="none", label=f"{count} {words}", **look))
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


def _name_regions(axis: Any, regions: Sequence[_Region]) -> None:
    """The names of several regions in their upper left corners."""
    cell, left = _cell_size(regions), 0
    for region in regions if len(regions) > 1 else ():
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
        axis.text(left + 4, 4, region.name, fontsize=7, va="top", bbox=box)
        left += (region.patches.shape[1] + 1) * cell


__all__ = ["COLORS", "plot_recovery"]
