"""LLaVA-NeXT: pictures of any shape, one tile or five, under one budget; stock where nothing is left out."""

import pytest
import tiny
import torch
from architectures import (
    LLAVA,
    assert_clear_choices,
    assert_same_records,
    each_side,
    generate,
    labels_of,
    stock_inputs,
)
from next_model import (
    BATCHES,
    CELLS,
    LARGEST,
    MIXED,
    NEXT,
    PATCHES,
    SIZES,
    TEXTS,
    TILE_SETTINGS,
    each_setting,
    encode,
    layout_and_states,
)

from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.layout import NEWLINE

NOTHING_LEFT_OUT = [
    {"enabled": False},
    {"budget": 1.0, "merged_tokens": 0},
    {"budget": 1.0, "merged_tokens": 0, "position_ids": "original"},
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
each_text_and_batch = pytest.mark.parametrize(
    ("text", "rows"), [*(("llama", name) for name in BATCHES), ("mistral", "mixed"), ("mistral", "several")]
)
each_text_and_setting = pytest.mark.parametrize(
    ("text", "name"), [*(("llama", name) for name in TILE_SETTINGS), ("mistral", "paper"), ("mistral", "spread")]
)


def test_the_pictures_cover_one_tile_to_five_and_all_kinds_of_unpadding():
    layout, _ = layout_and_states(NEXT.compressed(), encode([tuple(SIZES)]))
    assert sorted(set(layout.tiles)) == [2, 3, 4, 5]
    whole = [int(valid.sum()) == len(valid) * PATCHES for valid in layout.valid.split(layout.tiles)]
    assert set(whole) == {True, False}
    assert (layout.slots == NEWLINE).any(-1).all()
    assert min(int(valid.sum()) for valid in layout.valid.split(layout.tiles)) == PATCHES


# --- nothing left out: stock, bit for bit ---------------------------------------------------------------------------


@torch.no_grad()
@each_text_and_batch
@each_side
def test_logits_are_stock(text, side, rows):
    stock, ours, batch = TEXTS[text].shared_stock(), TEXTS[text].compressed(), encode(BATCHES[rows], side)
    expected = stock(**stock_inputs(batch))
    # A row without patches keeps no newline, stock gives it one: "thin" is stock only when switched off.
    for setting in NOTHING_LEFT_OUT[: 1 if rows == "thin" else None]:
        assert torch.equal(ours(**batch, token_recovery=setting).logits, expected.logits), setting


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rows", [MIXED, BATCHES["several"]], ids=["mixed", "several"])
def test_generated_ids_are_stock(text, rows):
    stock, ours, batch = TEXTS[text].shared_stock(), TEXTS[text].compressed(), encode(rows)
    expected = generate(stock, stock_inputs(batch))
    for setting in NOTHING_LEFT_OUT:
        assert torch.equal(generate(ours, batch, token_recovery=setting), expected), setting


def test_placeholders_are_counted_as_upstream_counts_them():
    ours, upstream = encode(MIXED), encode(MIXED, processor=tiny.stock_next_processor())
    assert all(torch.equal(ours[name], value) for name, value in upstream.items())


# --- a batch --------------------------------------------------------------------------------------------------------


@each_text_and_setting
def test_no_choice_in_a_mixed_batch_depends_on_a_near_tie(text, name):
    assert_clear_choices(TEXTS[text].compressed(), encode((*MIXED, ("thin",))), TILE_SETTINGS[name])


@torch.no_grad()
@each_text_and_setting
def test_a_row_of_a_mixed_batch_is_its_single_run(text, name):
    model, rows, setting = TEXTS[text].compressed(), (*MIXED, ("thin",)), TILE_SETTINGS[name]
    batch = encode(rows)
    records, ids = model.recover(**batch, token_recovery=setting), generate(model, batch, token_recovery=setting)
    short, _ = model.compress_inputs(**batch, token_recovery=setting)
    for index, row in enumerate(rows):
        alone = encode([()] * index + [row])  # the questions belong to the rows
        alone = {key: value if key in ("pixel_values", "image_sizes") else value[-1:] for key, value in alone.items()}
        if row:
            mine = [records.pop(0) for _ in row]
            assert_same_records(mine, model.recover(**alone, token_recovery=setting))
        else:
            alone = {key: alone[key] for key in ("input_ids", "attention_mask")}
        single, _ = model.compress_inputs(**alone, token_recovery=setting)
        inside = short["attention_mask"][index].bool()
        assert torch.equal(short["input_ids"][index, inside], single["input_ids"][0][single["attention_mask"][0] > 0])
        if row:
            embeds = single["inputs_embeds"][0][single["attention_mask"][0] > 0]
            torch.testing.assert_close(short["inputs_embeds"][index, inside], embeds, **CLOSE)
        new = generate(model, alone, token_recovery=setting)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(ids[index, batch["input_ids"].shape[1] :][: len(new)], new)


# --- counts ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@each_setting
@each_side
def test_counts(setting, side):
    """Patch and merged tokens, newlines of rows that keep a patch, placeholders and features: all the same story."""
    model, rows = NEXT.compressed(), (*MIXED, ("thin",))
    batch = encode(rows, side)
    output = model(**batch, token_recovery=setting)
    short, _ = model.compress_inputs(**batch, token_recovery=setting)
    layout, _ = layout_and_states(model, batch)
    records = model.recover(**batch, token_recovery=setting)
    tokens, newlines = output.visual_token_counts, output.newline_counts
    assert tokens.tolist() == [int(record.counts.sum()) for record in records]
    start, expected = 0, []
    for slots, places, record in zip(layout.slots.tolist(), layout.rows.tolist(), records, strict=True):
        kept = (record.visual_mask | record.text_mask | record.coverage_mask).flatten().tolist()
        expected.append(len({r for s, r in zip(slots, places, strict=True) if s >= 0 and kept[s - start]} - {0}))
        start += len(kept)
    assert newlines.tolist() == expected
    assert len(output.image_hidden_states) == int(tokens.sum() + newlines.sum())
    assert int((short["input_ids"] == model.config.image_token_id).sum()) == len(output.image_hidden_states)
    if "method" not in setting:
        assert newlines.sum() > 0
    counts = [layout.valid.split(layout.tiles)[image].sum().item() for image in range(len(records))]
    if setting.get("method") == "pooling":  # whole cells, see test_baselines
        return
    if isinstance(setting.get("budget"), int):
        assert tokens.tolist() == [setting["budget"]] * len(records)
    elif "budget" in setting:
        assert tokens.tolist() == [int(setting["budget"] * count + 0.5) for count in counts]


@torch.no_grad()
@each_setting
def test_patches_removed_by_unpadding_are_neither_kept_nor_merged(setting):
    model, batch = NEXT.compressed(), encode(BATCHES["several"])
    layout, _ = layout_and_states(model, batch)
    records = model.recover(**batch, token_recovery=setting)
    for valid, record in zip(layout.valid.split(layout.tiles), records, strict=True):
        removed = ~valid
        for mask in (record.visual_mask, record.text_mask, record.coverage_mask, record.centre_mask):
            assert not mask[removed].any()
        assert (record.cluster[removed] == -1).all()
        assert (record.saliency[removed] == 0).all()
        if not setting:
            assert (record.cluster[valid] >= 0).all()
    assert not layout.valid.all()


def test_tiles_compete_by_saliency_of_their_own():
    """A budget is not dealt out by number: tiles get different shares, and the base tile is one of them."""
    records = NEXT.compressed().recover(**encode([("large",)]), token_recovery={"budget": 100, "text_share": 0.0})
    counts = records[0].counts.tolist()
    assert sum(counts) == 100
    assert len(counts) == 5
    assert counts[0] > 0
    assert len(set(counts)) > 1


# --- newlines and training ------------------------------------------------------------------------------------------


def test_the_newline_is_trained_through_the_rows_that_stay():
    model = NEXT.build()
    for rows, setting in ((MIXED, {}), (MIXED, {"budget": 24}), (BATCHES["wide"], {"method": "pooling_2x2"})):
        batch = encode(rows)
        model.zero_grad()
        output = model(**batch, labels=labels_of(model, batch), token_recovery=setting)
        output.loss.backward()
        gradient = model.model.image_newline.grad
        assert bool(gradient.abs().sum() > 0) == bool(output.newline_counts.sum() > 0)
        assert torch.isfinite(gradient).all()
    assert output.newline_counts.sum() == 0


@torch.no_grad()
def test_kept_newlines_are_the_newline_itself():
    model, batch = NEXT.compressed(), encode(MIXED)
    output = model(**batch, token_recovery={"budget": 24})
    newline = model.model.image_newline
    assert int((output.image_hidden_states == newline).all(-1).sum()) == int(output.newline_counts.sum()) > 0


# --- vision tower and projector -------------------------------------------------------------------------------------


@torch.no_grad()
@each_setting
def test_one_call_of_tower_and_projector(setting):
    model, batch, seen = NEXT.compressed(), encode(MIXED), []
    parts = (clip_vision_model(model.model.vision_tower).embeddings, model.model.multi_modal_projector)
    hooks = [part.register_forward_pre_hook(lambda module, args: seen.append((module, args[0]))) for part in parts]
    try:
        output = model(**batch, token_recovery=setting)
    finally:
        for hook in hooks:
            hook.remove()
    assert [module for module, _ in seen] == list(parts)
    layout, _ = layout_and_states(model, batch)
    assert len(seen[0][1]) == sum(layout.tiles)
    assert seen[1][1].shape[:-1].numel() == int(output.visual_token_counts.sum())
    records = model.recover(**batch, token_recovery=setting)
    rows = [tile[:count] for record in records for tile, count in zip(record.tokens, record.counts, strict=True)]
    torch.testing.assert_close(seen[1][1].flatten(0, -2), torch.cat(rows), **CLOSE)


# --- comparison methods ---------------------------------------------------------------------------------------------


def pooled(states, valid, side):
    """Means of a tile's cells of side x side patches, those that exist, by loops."""
    cells = {}
    for patch, exists in enumerate(valid.tolist()):
        if exists:
            cells.setdefault((patch // CELLS // side, patch % CELLS // side), []).append(patch)
    return [torch.stack([states[patch] for patch in members]).mean(0) for members in cells.values()]


@torch.no_grad()
@pytest.mark.parametrize("architecture", [LLAVA, NEXT], ids=["llava", "llava_next"])
@pytest.mark.parametrize("side", [2, 3])
def test_pooling(architecture, side):
    model, setting = architecture.compressed(), {"method": f"pooling_{side}x{side}"}
    batch = architecture.encode() if architecture is LLAVA else encode((*MIXED, ("thin",)))
    layout, states = layout_and_states(model, batch)
    valid = torch.ones_like(states[..., 0], dtype=torch.bool) if layout.valid is None else layout.valid
    expected = [pooled(*tile, side) for tile in zip(states, valid, strict=True)]
    records = model.recover(**batch, token_recovery=setting)
    counts = [count for record in records for count in record.counts.tolist()]
    assert counts == [len(tokens) for tokens in expected]
    assert max(counts) == {2: 25, 3: 16}[side]
    tokens = [tile[:count] for record in records for tile, count in zip(record.tokens, record.counts, strict=True)]
    torch.testing.assert_close(torch.cat(tokens), torch.stack([mean for tile in expected for mean in tile]), **CLOSE)
    output = model(**batch, token_recovery=setting)
    assert output.newline_counts.sum() == 0
    projected = model.model.multi_modal_projector(torch.cat(tokens))
    torch.testing.assert_close(output.image_hidden_states, projected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [LLAVA, NEXT], ids=["llava", "llava_next"])
def test_base_tile(architecture):
    model = architecture.compressed()
    batch = architecture.encode() if architecture is LLAVA else encode(MIXED)
    output = model(**batch, token_recovery={"method": "base_tile"})
    layout, states = layout_and_states(model, batch)
    first = [sum(layout.tiles[:image]) for image in range(len(layout.tiles))]
    assert output.visual_token_counts.tolist() == [PATCHES] * len(first)
    assert output.newline_counts.sum() == 0
    projected = model.model.multi_modal_projector(states[first].flatten(0, 1))
    torch.testing.assert_close(output.image_hidden_states, projected, **CLOSE)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_image_sizes_that_do_not_fit_are_refused():
    model, batch = NEXT.compressed(), encode([("wide",)])
    for call in (model, model.compress_inputs, model.recover, model.generate):
        with pytest.raises(ValueError, match="needs image_sizes with pixel_values"):
            call(**{**batch, "image_sizes": None})
    large, small = torch.tensor([[90, 90]]), torch.tensor([[40, 40]])
    for sizes in (large, batch["image_sizes"].repeat(2, 1)):
        with pytest.raises(ValueError, match=r"pixel_values of shape \(1, 4, .*do not fit \d image_sizes"):
            model(**{**batch, "image_sizes": sizes})
    for sizes, count in ((large, 5), (small, 2)):
        with pytest.raises(ValueError, match=f"pixel_values hold 4 tiles, image_sizes need {count}"):
            model(**{**batch, "pixel_values": batch["pixel_values"][0], "image_sizes": sizes})
    with pytest.raises(ValueError, match="placeholders and images do not match"):
        model(**{**batch, "image_sizes": batch["image_sizes"] - torch.tensor([[20, 0]])})


@torch.no_grad()
def test_a_budget_may_be_as_large_as_the_largest_picture():
    """Smaller images keep all their tokens, whatever else is in the batch."""
    model, stock, tiny_alone = NEXT.compressed(), NEXT.shared_stock(), encode([("tiny",)])
    with pytest.raises(ValueError, match=f"budget is {LARGEST + 1}, but an image has only {LARGEST} patches"):
        model(**encode([("large",)]), token_recovery={"budget": LARGEST + 1})
    with pytest.raises(ValueError, match=f"only {LARGEST} patches"):
        NEXT.build(budget=LARGEST + 1)
    counts = model(**encode([("tiny",), ("large",)]), token_recovery={"budget": 450}).visual_token_counts.tolist()
    assert counts[1] == 450
    assert counts[0] < 2 * PATCHES
    alone = model(**tiny_alone, token_recovery={"budget": 450})
    assert alone.visual_token_counts.tolist() == counts[:1]
    assert torch.equal(alone.logits, stock(**stock_inputs(tiny_alone)).logits)
