"""`newlines: "none"`: a LLaVA-NeXT picture is its patch and merged tokens alone, so that a budget says how many."""

import dataclasses

import pytest
import tiny
import torch
from architectures import LLAVA, each_side, generate, greedy_by_hand
from next_model import MIXED, NEXT, TILE_SETTINGS, encode, layout_and_states, picture

import reccomp_hf
from reccomp_hf.checkpoints.cards.content import field_rows
from reccomp_hf.core.layout import NEWLINE

NONE = {"newlines": "none"}
# Pooling's tokens are all merged ones and have no row.
FIXED = {name: fields for name, fields in TILE_SETTINGS.items() if "budget" in fields and name != "pooling"}
each_fixed = pytest.mark.parametrize("setting", FIXED.values(), ids=FIXED)


def without_newlines(model, batch, setting, fill):
    """The short inputs with newlines, and a mask of the newlines among their slots, found by embedding."""
    short, _ = model.compress_inputs(**batch, token_recovery=setting)
    newline = (short["inputs_embeds"] == model.model.image_newline).all(-1)
    return short, newline & (short["input_ids"] == model.config.image_token_id) & fill


@torch.no_grad()
@each_side
@each_fixed
def test_the_other_tokens_are_the_same(setting, side):
    model, batch = NEXT.compressed(), encode(MIXED, side)
    kept, newline = without_newlines(model, batch, setting, torch.tensor(True))
    short, _ = model.compress_inputs(**batch, token_recovery={**setting, **NONE})
    output = model(**batch, token_recovery={**setting, **NONE})
    before = model(**batch, token_recovery=setting)
    assert newline.sum() == before.newline_counts.sum() > 0
    assert output.newline_counts.tolist() == [0] * len(before.newline_counts)
    assert torch.equal(output.visual_token_counts, before.visual_token_counts)
    assert len(output.image_hidden_states) == output.visual_token_counts.sum()
    for row in range(len(MIXED)):
        stays = kept["attention_mask"][row].bool() & ~newline[row]
        inside = short["attention_mask"][row].bool()
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if name == "position_ids" and setting.get("position_ids") != "original":
                continue
            assert torch.equal(short[name][row, inside], kept[name][row, stays]), name


@torch.no_grad()
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_generated_ids_are_of_the_sequence_without_them(positions):
    model, batch, setting = NEXT.compressed(), encode(MIXED), {"budget": 24, "position_ids": positions}
    new = generate(model, batch, token_recovery={**setting, **NONE})[:, batch["input_ids"].shape[1] :]
    kept, newline = without_newlines(model, batch, setting, torch.tensor(True))
    for row in range(len(MIXED)):
        stays = kept["attention_mask"][row].bool() & ~newline[row]
        embeds, mask = kept["inputs_embeds"][row : row + 1, stays], torch.ones(1, int(stays.sum()))
        place = kept["position_ids"][row : row + 1, stays] if positions == "original" else mask.long().cumsum(-1) - 1
        hand = greedy_by_hand(NEXT, embeds, mask, place)
        assert new[row].tolist()[: hand.shape[1]] == hand[0].tolist()


def test_a_picture_may_lose_all_its_tokens_but_the_budgets():
    """However thin the grid: the count is the budget, or all patches where there are fewer."""
    model, batch = NEXT.compressed(), encode((("thin",), ("square",)))
    for budget in (1, 24, 0.1, 1.0):
        output = model(**batch, token_recovery={"budget": budget, "merged_tokens": 0, **NONE})
        layout, _ = layout_and_states(model, batch)
        patches = [int(valid.sum()) for valid in layout.valid.split(layout.tiles)]
        wanted = [budget if isinstance(budget, int) else int(budget * count + 0.5) for count in patches]
        assert output.visual_token_counts.tolist() == wanted


def test_labels_are_shortened_with_the_ids():
    model, batch = NEXT.compressed(), encode(MIXED)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    short, _ = model.compress_inputs(**batch, labels=labels, token_recovery={"budget": 24, **NONE})
    assert short["labels"].shape == short["input_ids"].shape
    inside = short["attention_mask"].bool()
    assert torch.equal(short["labels"][inside], short["input_ids"][inside])


@pytest.mark.parametrize("mode", ["rebuild", "append", "keep"])
def test_conversations(mode):
    processor = NEXT.processor()
    lengths = {}
    for newlines in ("kept", "none"):
        fields = {"budget": 24, "merged_tokens": 0, "newlines": newlines}
        talk = reccomp_hf.Conversation(NEXT.compressed(), processor, mode=mode, token_recovery=fields)
        for question, images in ((tiny.SENTENCES[0], [picture("broad")]), (tiny.SENTENCES[1], None)):
            talk.ask(question, images=images, max_new_tokens=3)
        kinds = [token.kind for token in talk._cache.visual] if mode != "rebuild" else []
        assert ("newline" in kinds) == (newlines == "kept" and mode != "rebuild")
        lengths[newlines] = [turn.cache_length for turn in talk.turns]
    assert all(none < kept for none, kept in zip(lengths["none"], lengths["kept"], strict=True))


def test_llava_1_5_has_none_in_any_case():
    model, batch = LLAVA.compressed(), LLAVA.encode()
    logits = [model(**batch, token_recovery={"budget": 24, **fields}).logits for fields in ({}, NONE)]
    assert torch.equal(*logits)


def test_the_layout_alone():
    layout, _ = layout_and_states(NEXT.compressed(), encode((("wide",),)))
    assert (layout.slots == NEWLINE).any()
    everything = torch.ones(sum(layout.tiles), layout.patches, dtype=torch.bool)
    for newlines in ("kept", "none"):
        kept, rows = layout.with_newlines(newlines).kept(everything)
        assert torch.equal(kept, layout.slots >= 0)
        assert torch.equal(rows, (layout.slots == NEWLINE) & (newlines == "kept"))


def test_the_newlines_field():
    with pytest.raises(ValueError, match=r"token_recovery.newlines must be 'kept' or 'none', got 'all'"):
        reccomp_hf.TokenRecoveryConfig(newlines="all")
    section = reccomp_hf.TokenRecoveryConfig(budget=16, newlines="none")
    assert section.to_dict()["newlines"] == "none"
    assert "newlines" in {row["name"] for row in field_rows(section)}
    assert "newlines" not in {row["name"] for row in field_rows(section, tiled=False)}
    assert dataclasses.replace(section) == section
