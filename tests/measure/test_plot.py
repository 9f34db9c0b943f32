"""The picture of what was read shows what the record says, where it says it."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
import tiny
import torch
from architectures import LLAVA
from next_model import NEXT, SIZES, encode, picture
from PIL import Image

import reccomp_hf
from reccomp_hf.measure import plot as visualization
from reccomp_hf.measure.plot import COLORS, plot_recovery
from reccomp_hf.measure.regions import processed_tiles, regions_of

SIDE = tiny.IMAGE_SIZE // tiny.PATCH_SIZE
GREY = Image.new("RGB", (60, 60), (200, 200, 200))
QUESTION = tiny.SENTENCES[0]


def record_of(image=GREY, **setting):
    """A record of the tiny model on one picture."""
    processor = LLAVA.processor()
    inputs = processor(images=image, text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    return LLAVA.compressed().recover(**inputs, token_recovery=setting)[0]


def pixels_of(figure):
    """The figure as it is written to a PNG: (height, width, 3)."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def at(figure, pixels, axis, x, y):
    """The pixel of a point in a panel's own coordinates."""
    column, row = axis.transData.transform((x, y))
    return pixels[len(pixels) - 1 - round(row), round(column)]


def patch_points(axis, columns, patch):
    """Where a patch's middle is, and its frame's left edge near the corner, in a panel of one region."""
    cell = axis.images[0].get_array().shape[1] / columns
    row, column = divmod(patch, columns)
    middle = (column * cell + cell / 2 - 0.5, row * cell + cell / 2 - 0.5)
    return middle, (column * cell + 0.8, row * cell + 3)


def is_near(pixel, color, tolerance=45):
    return np.abs(np.asarray(pixel) - np.asarray(color)).max() <= tolerance


PLOT_SETTINGS = {
    "all": {"budget": 40, "coverage_share": 0.25, "merged_tokens": 6},
    "dropped": {"budget": 30, "coverage_share": 0.25, "merged_tokens": 0},
    "paper": {},
    "pooling": {"method": "pooling", "budget": 16},
}


@pytest.mark.parametrize("setting", PLOT_SETTINGS.values(), ids=PLOT_SETTINGS)
def test_marks_are_where_the_record_says(setting):
    record = record_of(tiny.pictures(1)[0], **setting)
    figure = plot_recovery(GREY, record, questions=QUESTION)
    pixels, axis, seen = pixels_of(figure), figure.axes[0], set()
    for patch in range(SIDE * SIDE):
        middle, edge = patch_points(axis, SIDE, patch)
        middle, edge = (at(figure, pixels, axis, *point) for point in (middle, edge))
        kinds = [name for name in ("visual", "text", "coverage") if getattr(record, f"{name}_mask")[0, patch]]
        if kinds:
            seen.add(kinds[0])
            assert is_near(middle, (200, 200, 200)), (patch, middle)  # as it is
            assert is_near(edge, COLORS[kinds[0]]), (patch, kinds, edge)
        elif record.centre_mask[0, patch]:
            seen.add("centre")
            assert is_near(middle, COLORS["centre"]), (patch, middle)
        elif record.cluster[0, patch] >= 0:
            seen.add("merged")
            assert 80 < middle.mean() < 160 and np.ptp(middle) > 15, (patch, middle)  # dim, tinted
        else:
            seen.add("dropped")
            assert middle.mean() < 110 and np.ptp(middle) < 8, (patch, middle)  # dim, grey
    expected = {
        "all": {"visual", "text", "coverage", "centre", "merged"},
        "dropped": {"visual", "text", "coverage", "dropped"},
        "pooling": {"centre", "merged"},
    }
    names = [name for name in PLOT_SETTINGS if PLOT_SETTINGS[name] is setting]
    assert seen == expected.get(names[0], seen) and len(seen) > 1


def test_clusters_can_be_told_apart():
    record = record_of(method="pooling", budget=4)
    figure = plot_recovery(GREY, record)
    pixels, axis = pixels_of(figure), figure.axes[0]
    corners = (1, SIDE - 2, SIDE * (SIDE - 1) + 1, SIDE * SIDE - 2)
    tints = [at(figure, pixels, axis, *patch_points(axis, SIDE, patch)[0]) for patch in corners]
    assert all(np.abs(one - other).max() > 15 for i, one in enumerate(tints) for other in tints[:i])
    same = at(figure, pixels, axis, *patch_points(axis, SIDE, SIDE + 1)[0])
    assert np.abs(same - tints[0]).max() < 5
    row = axis.transData.transform(patch_points(axis, SIDE, SIDE)[0])[1]
    across = pixels[len(pixels) - 1 - round(row)]
    start, end = (round(axis.transData.transform((x, 0))[0]) for x in axis.get_xlim())
    light = (across[start:end].min(-1) > 170).sum()
    assert 1 <= light <= 4  # the border in the middle, and nothing else


def test_several_questions_stand_side_by_side_with_counts_and_words():
    records = [record_of(budget=budget, merged_tokens=3) for budget in (10, 20)]
    questions, answers = ["Is it red?", "How many are there?"], ["yes", "two"]
    figure = plot_recovery(GREY, records, processor=LLAVA.processor(), questions=questions, answers=answers)
    axes = figure.axes
    assert [axis.get_title(loc="left") for axis in axes] == [*questions, "The picture as the model sees it"]
    for axis, record, answer in zip(axes[:2], records, answers, strict=True):
        total = int(record.counts)
        assert f"answer: {answer}\nreads {total} of 100 tokens ({total}%)" == axis.get_xlabel()
        lines = [text.get_text() for text in axis.get_legend().get_texts()]
        visual, text = int(record.visual_mask.sum()), int(record.text_mask.sum())
        assert lines == [
            f"{visual} stand out in the picture",
            f"{text} fit the question",
            "3 averages of tinted areas (at the dots)",
        ]
    pixels = pixels_of(figure)
    assert pixels.shape[1] > 900 and pixels.shape[0] > 300
    assert pixels.std() > 30


def test_frames_differ_in_lines_too():
    record = record_of(tiny.pictures(1)[0], budget=40, coverage_share=0.25, merged_tokens=0)
    figure = plot_recovery(GREY, record)
    pixels, axis, painted = pixels_of(figure), figure.axes[0], {}
    for kind in ("visual", "text", "coverage"):
        patch = int(getattr(record, f"{kind}_mask")[0].nonzero()[0])
        (x, y), _ = patch_points(axis, SIDE, patch)
        cell = axis.images[0].get_array().shape[1] / SIDE
        line = [at(figure, pixels, axis, x - cell / 2 + 0.8 + step, y) for step in np.arange(0, cell / 2, 0.5)]
        near = [is_near(pixel, COLORS[kind]) for pixel in line]
        painted[kind] = sum(a and not b for a, b in itertools.pairwise([*near, False]))  # lines from edge to middle
    assert painted == {"visual": 2, "text": 1, "coverage": 0}


def test_a_question_without_tokens_of_its_own_is_explained():
    settings = {"text_share": 1.0, "text_limit": "outliers", "coverage_share": 0.5, "outlier_threshold": 1000.0}
    record = record_of(budget=12, merged_tokens=0, **settings)
    lines = [line.get_text() for line in plot_recovery(GREY, record).axes[0].get_legend().get_texts()]
    assert lines == [
        "no patch stands out for the question",
        "12 kept to cover the picture",
        "88 patches not read at all",
    ]
    blind = record_of(method="divprune", budget=12)
    lines = plot_recovery(GREY, blind, method="divprune").axes[0].get_legend().get_texts()
    assert "no patch stands out for the question" not in [line.get_text() for line in lines]


def test_a_text_without_glyphs_is_a_sentence_and_the_title_is_drawn():
    questions = ["\u5728\u54ea\u91cc", "\u00e0 gauche?"]
    figure = plot_recovery(GREY, [record_of()] * 2, questions=questions, title="demo, preset paper")
    titles = [axis.get_title(loc="left") for axis in figure.axes[:2]]
    assert "script" in titles[0] and titles[1] == questions[1]
    assert figure.get_suptitle() == "demo, preset paper"


def test_answers_are_drawn_as_they_are(recwarn):
    questions, answers = ["Is it $5 or $6?", "Why?"], ["$\\frac{5}$ or $x_", "\x14 \u5728"]
    figure = plot_recovery(GREY, [record_of()] * 2, questions=questions, answers=answers)
    pixels_of(figure)
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    assert figure.axes[0].get_title(loc="left").replace("\\$", "$") == questions[0]
    assert figure.axes[0].get_xlabel().startswith("answer: \\$\\frac{5}\\$ or \\$x_\n")
    assert "script" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize(("questions", "across", "empty"), [(1, 2, 0), (3, 4, 0), (4, 3, 1), (5, 3, 0), (6, 4, 1)])
def test_rows_of_panels_have_few_empty_places(questions, across, empty):
    figure = plot_recovery(GREY, [record_of()] * questions)
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.ncols, grid.nrows * grid.ncols - questions - 1) == (across, empty)
    assert len(figure.axes) == questions + 1 + bool(empty)  # the explanation fills the empty place


def test_what_does_not_occur_is_not_in_the_legend():
    legends = {
        "prumerge": ["4 averages of tinted areas (at the dots)", "96 in several of the averages, or in none"],
        "divprune": ["4 kept to cover the picture", "96 patches not read at all"],
    }
    for method, wanted in legends.items():
        figure = plot_recovery(GREY, record_of(method=method, budget=4), method=method)
        assert [line.get_text() for line in figure.axes[0].get_legend().get_texts()] == wanted
    lines = plot_recovery(GREY, record_of(method="random", budget=9), method="random").axes[0].get_legend().get_texts()
    assert [line.get_text() for line in lines] == ["9 drawn at random", "91 patches not read at all"]


def test_the_picture_is_scaled_and_cut_as_the_processor_does():
    image = tiny.pictures(1)[0].resize((120, 70))
    processor = LLAVA.processor()
    record = record_of(image, budget=100, merged_tokens=0)
    seen = processed_tiles(image, processor)[0]
    values = processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (
        torch.tensor(part).view(3, 1, 1)
        for part in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    shown = torch.from_numpy(np.array(seen)).permute(2, 0, 1) / 255
    torch.testing.assert_close(shown, values * std + mean, rtol=0, atol=2 / 255)
    by_itself, with_it = (
        plot_recovery(image, record, processor=each).axes[1].images[0].get_array().astype(int)
        for each in (None, processor)
    )
    assert np.abs(by_itself - with_it).mean() < 12  # the middle square either way
    assert np.abs(by_itself[:, ::-1] - with_it).mean() > 20


# ---- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SIZES))
def test_tiles_are_at_their_places(name):
    model, processor = NEXT.compressed(), NEXT.processor()
    batch = encode([(name,)], processor=processor)
    (record,) = model.recover(**batch, token_recovery={"budget": 0.2, "coverage_share": 0.3, "merged_tokens": 4})
    _, layout = model._layout(batch["pixel_values"], batch["image_sizes"])
    regions = regions_of(picture(name), [record], processor)
    shown = np.concatenate([region.patches.flatten() for region in regions])
    assert sorted(shown.tolist()) == layout.valid.flatten().nonzero().flatten().tolist()
    packed = [slot for slot in layout.slots[0].tolist() if slot >= 0]
    assert shown.tolist() == packed  # rows of the whole grid, as the language model reads them
    if len(regions) == 1:
        return
    # The details show the same picture as the overview, which is squeezed into a square.
    detail = np.asarray(regions[1].picture.resize((40, 40), Image.Resampling.BOX)).astype(float)
    base = np.asarray(picture(name).resize((40, 40), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(detail.flatten(), base.flatten())[0, 1] > (0.8 if min(picture(name).size) > 16 else 0.5)
    figure = plot_recovery(picture(name), record, processor=processor, questions=QUESTION)
    cell, rows = visualization._cell_size(regions), regions[1].patches
    array = figure.axes[0].images[0].get_array().astype(int)
    left = (regions[0].patches.shape[1] + 1) * cell
    kinds, _, _ = visualization._patch_kinds(record)
    for row, column in np.ndindex(rows.shape):
        kind = kinds[rows[row, column]]
        if kind in COLORS:
            assert is_near(array[row * cell + 2, left + column * cell], COLORS[kind], 0)


def test_tiles_need_the_processor():
    (record,) = NEXT.compressed().recover(**encode([("wide",)]))
    with pytest.raises(ValueError, match="pass processor="):
        plot_recovery(picture("wide"), record)
    with pytest.raises(ValueError, match="but the processor cuts this image into 1"):
        plot_recovery(picture("wide"), record, processor=LLAVA.processor())


@pytest.mark.parametrize("name", ["questions", "answers"])
def test_texts_are_one_for_each_record(name):
    with pytest.raises(ValueError, match=f"There must be one of {name} for each of the 1 records, got 2"):
        plot_recovery(GREY, record_of(), **{name: ["a", "b"]})


def test_records_of_two_pictures_are_refused():
    record = record_of(budget=10)
    other = dataclasses.replace(record, cluster=record.cluster[:, :64])
    with pytest.raises(ValueError, match="Records must belong to one image"):
        plot_recovery(GREY, [record, other])


def test_the_package_names_it():
    assert reccomp_hf.plot_recovery is plot_recovery
