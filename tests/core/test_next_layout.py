"""LLaVA-NeXT's placeholders, and which of them stay in which order, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_layout import PATCH, PATCHES, PINPOINTS, SIDE, Size, best_pinpoint, packed_oracle
from transformers import CLIPVisionConfig, LlavaNextProcessor

import reccomp_hf
from reccomp_hf.core.features import Sizes, TokenRecoveryOutput
from reccomp_hf.core.layout import NEWLINE, PADDING, ImageLayout

sizes_strategy = st.lists(st.tuples(st.integers(1, 2500), st.integers(1, 2500)), min_size=1, max_size=3)
many = settings(max_examples=250, deadline=None, derandomize=True)
some = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def model() -> Any:
    """A visual-only model of narrow layers with the real geometry; only its layout is used."""
    base = tiny.llava_config()
    vision = CLIPVisionConfig(**{**base.vision_config.to_dict(), "image_size": SIDE, "patch_size": PATCH})
    config = reccomp_hf.LlavaNextRecCompConfig(vision, base.text_config, image_grid_pinpoints=PINPOINTS)
    return reccomp_hf.LlavaNextRecCompForConditionalGeneration(config)


@pytest.fixture(scope="module")
def processor() -> LlavaNextProcessor:
    stock = tiny.stock_next_processor()
    stock.patch_size, stock.image_processor.image_grid_pinpoints = PATCH, PINPOINTS
    return stock


def layout_of(model: Any, sizes: list[Size]) -> ImageLayout:
    tiles = sum(packed_oracle(size)[2] for size in sizes)
    pixel_values, layout = model._layout(torch.zeros(tiles, 3, 1, 1), torch.tensor(sizes))
    assert len(pixel_values) == tiles
    return layout


def check_layout(model: Any, processor: LlavaNextProcessor, sizes: list[Size]) -> ImageLayout:
    layout, start = layout_of(model, sizes), 0
    valid = torch.zeros(sum(layout.tiles) * PATCHES, dtype=torch.bool)
    for image, size in enumerate(sizes):
        slots, rows, tiles = packed_oracle(size)
        length = len(slots)
        assert length == processor._get_number_of_features(*size, SIDE, SIDE) - 1  # the class token
        assert (layout.lengths[image], layout.tiles[image]) == (length, tiles)
        slots = [slot if slot == NEWLINE else slot + start * PATCHES for slot in slots]
        assert layout.slots[image].tolist() == slots + [PADDING] * (layout.slots.shape[1] - length)
        assert layout.rows[image, :length].tolist() == rows
        valid[[slot for slot in slots if slot != NEWLINE]] = True
        start += tiles
    assert layout.slots.shape[1] == max(layout.lengths)
    assert torch.equal(layout.valid.flatten(), valid)
    assert layout.image_of_tile(layout.slots).tolist() == [
        i for i, tiles in enumerate(layout.tiles) for _ in range(tiles)
    ]
    return layout


@pytest.mark.parametrize("pinpoint", PINPOINTS, ids=str)
def test_every_pinpoint(pinpoint: list[int], model: Any, processor: LlavaNextProcessor) -> None:
    height, width = pinpoint
    assert best_pinpoint((height, width)) == (height, width)
    sizes = [(height, width), (height - 60, width), (height, width - 60), (height * 2 + 3, width * 2), (1, width)]
    layout = check_layout(model, processor, sizes)
    rows, columns = height // PATCH, width // PATCH
    assert layout.lengths[0] == PATCHES + rows * (columns + 1)  # nothing to unpad
    assert min(layout.lengths) < layout.lengths[0]


def test_a_picture_too_thin_for_a_row_of_patches_has_its_base_tile_alone(model: Any, processor: Any) -> None:
    layout = check_layout(model, processor, [(1, 2000), (500, 400)])
    assert layout.lengths[0] == PATCHES
    assert layout.valid[: layout.tiles[0]].sum(-1).tolist() == [PATCHES, *[0] * (layout.tiles[0] - 1)]


@many
@given(sizes=sizes_strategy)
def test_any_size(sizes: list[Size], model: Any, processor: Any) -> None:
    check_layout(model, processor, sizes)


def test_lengths_are_what_the_real_processor_expands() -> None:
    processor, side = tiny.stock_next_processor(), tiny.IMAGE_SIZE
    processor.image_processor.image_grid_pinpoints = [[h * side // SIDE, w * side // SIDE] for h, w in PINPOINTS]
    sizes = [(40, 40), (61, 200), (200, 61), (17, 20), (3, 90), (90, 3), (333, 100)]
    images = [tiny.pictures(1)[0].resize(size[::-1]) for size in sizes]
    encoded = processor(images=images, text=["<image>"] * len(sizes), padding=True, return_tensors="pt")
    config = tiny.llava_config()
    config = reccomp_hf.LlavaNextRecCompConfig(
        config.vision_config, config.text_config, image_grid_pinpoints=processor.image_processor.image_grid_pinpoints
    )
    tiny_model = reccomp_hf.LlavaNextRecCompForConditionalGeneration(config)
    pixel_values, layout = tiny_model._layout(encoded["pixel_values"], encoded["image_sizes"])
    image_token = tiny.SPECIAL_TOKENS.index("<image>")
    assert layout.lengths == (encoded["input_ids"] == image_token).sum(-1).tolist()
    assert len(set(layout.tiles)) > 1
    assert pixel_values.shape == (sum(layout.tiles), 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    flat_values, same = tiny_model._layout(pixel_values, encoded["image_sizes"].tolist())
    assert torch.equal(flat_values, pixel_values)
    assert torch.equal(same.slots, layout.slots)


def test_newlines_are_known_where_as_many_patches_are_unpadded() -> None:
    order = torch.tensor([0, 1, 2, 3, 6, 7, -1, 8, 9, -1, 10, 11, -1, 12, 13, -1])  # 16 slots of 4 tiles of 4 patches
    layout = ImageLayout.of_packed([order], [4], 4)
    assert layout.has_newlines
    assert layout.valid is not None
    assert int(layout.valid.sum()) == 12


def test_one_tile_without_a_grid_has_one_newline() -> None:
    layout = ImageLayout.of_packed([torch.tensor([0, 1, 2, 3, NEWLINE])], [1], 4)
    assert layout.has_newlines
    assert layout.rows.tolist() == [[0] * 5]
    assert layout.valid.tolist() == [[True] * 4]


# --- what is kept of it ---------------------------------------------------------------------------------------------


def random_choice(layout: ImageLayout, seed: int) -> TokenRecoveryOutput:
    """Scattered kept patches and centres, tile by tile with a density of its own, and where the tokens stand."""
    rng = np.random.default_rng(seed)
    tiles, patches = layout.valid.shape
    density = rng.choice([0, 0.002, 0.05, 0.5, 1], (tiles, 1))
    valid, none = layout.valid.numpy(), torch.zeros(tiles, patches, dtype=torch.bool)
    kept = valid & (rng.random((tiles, patches)) < density)
    centres = valid & ~kept & (rng.random((tiles, patches)) < rng.choice([0, 0.01], (tiles, 1)))
    places, clusters = [], []
    for row, centre in zip(kept, centres, strict=True):
        order = [*np.flatnonzero(row).tolist(), *np.flatnonzero(centre).tolist()]
        places.append(order)
        clusters.append([order.index(patch) if patch in order else -1 for patch in range(patches)])
    counts = torch.tensor([len(order) for order in places])
    padded = [order + [-1] * (int(counts.max()) - len(order)) for order in places]
    kept, centres = torch.from_numpy(kept), torch.from_numpy(centres)
    record = TokenRecoveryOutput(
        tokens=torch.zeros(tiles, int(counts.max()), 1),
        counts=counts,
        visual_mask=kept,
        text_mask=none,
        coverage_mask=none,
        centre_mask=centres,
        cluster=torch.tensor(clusters),
        places=torch.tensor(padded, dtype=torch.long),
        saliency=none.float(),
        text_similarity=None,
    )
    return record


def sizes_of(record: TokenRecoveryOutput) -> Sizes:
    return Sizes(int(record.counts.max()), int(record.merged_counts.max()), int(record.counts.sum()))


def sequence_oracle(sizes: list[Size], record: TokenRecoveryOutput) -> list[tuple[list[int], list[int], int]]:
    """Per image: token of every new slot (the total for a newline), its old slot, and the newlines."""
    total, first, expected = int(record.counts.sum()), 0, []
    starts = [0]
    for count in record.counts.tolist():
        starts.append(starts[-1] + count)
    for size in sizes:
        slots, rows, tiles = packed_oracle(size)
        mine = record.kept_mask[first : first + tiles].flatten().tolist()
        rows_that_keep = {row for slot, row in zip(slots, rows, strict=True) if slot != NEWLINE and mine[slot]}
        index, place, newlines = [], [], 0
        for position, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            if slot == NEWLINE and row in rows_that_keep:
                index.append(total)
                place.append(position)
                newlines += 1
            elif slot != NEWLINE and mine[slot]:
                tile, patch = divmod(slot, PATCHES)
                index.append(starts[first + tile] + sum(mine[tile * PATCHES : tile * PATCHES + patch]))
                place.append(position)
        for tile in range(tiles):
            kept = sum(mine[tile * PATCHES : (tile + 1) * PATCHES])
            for seat, centre in enumerate(record.centre_mask[first + tile].nonzero().flatten().tolist()):
                index.append(starts[first + tile] + kept + seat)
                place.append(slots.index(tile * PATCHES + centre))
        expected.append((index, place, newlines))
        first += tiles
    return expected


@some
@given(sizes=sizes_strategy, seed=st.integers(0, 10**6))
def test_kept_slots_and_their_order(sizes: list[Size], seed: int, model: Any) -> None:
    layout = layout_of(model, sizes)
    record = random_choice(layout, seed)
    expected = sequence_oracle(sizes, record)
    tokens, newlines = layout.counts(record.kept_mask, record.merged_counts)
    assert newlines.tolist() == [wanted[2] for wanted in expected]
    assert (tokens + newlines).tolist() == [len(wanted[0]) for wanted in expected]
    assert int(tokens.sum()) == int(record.counts.sum())
    kept, kept_newlines = layout.kept(record.kept_mask)
    longest = max(len(wanted[0]) for wanted in expected)
    index, place = layout.sequence(record, sizes_of(record), longest)
    assert index.shape == place.shape == (len(sizes), longest)
    for image, (wanted_index, wanted_place, count) in enumerate(expected):
        assert index[image, : len(wanted_index)].tolist() == wanted_index
        assert place[image, : len(wanted_place)].tolist() == wanted_place
        in_order = (kept | kept_newlines)[image].nonzero().flatten().tolist()
        assert wanted_place[: len(in_order)] == in_order
        assert int(kept_newlines[image].sum()) == count


def test_a_token_without_a_place_stands_at_the_start(model: Any) -> None:
    layout = layout_of(model, [(336, 672)])
    record = random_choice(layout, 0)
    record.counts = record.kept_mask.sum(-1) + 1
    record.places = torch.full((len(record.counts), int(record.counts.max())), -1)
    longest = int(sum(count.sum() for count in layout.counts(record.kept_mask, record.merged_counts)))
    _, place = layout.sequence(record, sizes_of(record), longest)
    assert place[0, -len(record.counts) :].tolist() == [0] * len(record.counts)
