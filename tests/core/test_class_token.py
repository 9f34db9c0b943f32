"""The class token that VisionZip keeps: first of an image's tokens in the prompt, and where it has no place."""

from __future__ import annotations

import pytest
import torch
from architectures import each_architecture

from reccomp_hf.core.compat import clip_vision_model

BUDGET = 20
OPTIONS = {"contextual_share": 0.3}
SECTION = {"method": "visionzip", "method_options": OPTIONS, "budget": BUDGET, "position_ids": "compact"}


def tokens_in_order(model, batch, section):
    """The images' tokens as the language model reads them, and the class token's features of every tile."""
    features = model(**batch, token_recovery=section).image_hidden_states
    encoded = model.encode_images(batch["pixel_values"], batch.get("image_sizes"), token_recovery=section)
    blocks = len(clip_vision_model(model.model.vision_tower).encoder.layers)
    state = encoded.states[model.config.vision_feature_layer % (blocks + 1)]
    return features, model.model.multi_modal_projector(state[:, 0])


@torch.no_grad()
@each_architecture
def test_the_class_tokens_come_first(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    features, of_tiles = tokens_in_order(model, batch, SECTION)
    start = tile = 0
    outputs = model(**batch, token_recovery=SECTION)
    lengths = (outputs.visual_token_counts + outputs.newline_counts).tolist()
    for record, length in zip(model.recover(**batch, token_recovery=SECTION), lengths, strict=True):
        tiles = len(record.counts)
        whole = record.kept_mask.sum(-1) == record.counts  # a tile may keep all its patches, or get no token
        leads = of_tiles[tile : tile + tiles][~whole]
        assert len(leads)
        torch.testing.assert_close(features[start : start + len(leads)], leads)
        assert int(record.counts.sum()) == BUDGET
        assert (record.places[~whole, 0] == -1).all()
        assert (record.cluster[~whole] != 0).all()
        merged = record.merged_counts.sum() - len(leads)
        kept = record.kept_mask.sum()
        assert int(merged + kept) + len(leads) == BUDGET
        assert 0 < int(merged) < int(kept)
        start, tile = start + length, tile + tiles
    assert start == len(features)


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize(
    "fields", [{"position_ids": "original"}, {"method_options": {**OPTIONS, "class_token": False}}], ids=str
)
def test_without_it_a_patch_more_is_kept(architecture, fields):
    model, batch = architecture.compressed(), architecture.encode()
    found = zip(
        model.recover(**batch, token_recovery=SECTION),
        model.recover(**batch, token_recovery={**SECTION, **fields}),
        strict=True,
    )
    for with_class, without in found:
        assert (without.places[without.counts > 0, 0] >= 0).all()
        assert with_class.counts.equal(without.counts)
        leads = (with_class.places[:, 0] < 0) & (with_class.counts > 0)
        assert without.kept_mask.sum(-1).equal(with_class.kept_mask.sum(-1) + leads)
        assert (without.kept_mask | ~with_class.kept_mask).all()


@each_architecture
def test_the_class_token_trains_a_tower(architecture):
    model = architecture.build()
    model.model.vision_tower.requires_grad_(True)
    batch = architecture.encode()
    section = {**SECTION, "budget": 1}
    model(**batch, token_recovery=section).image_hidden_states.sum().backward()
    gradient = clip_vision_model(model.model.vision_tower).embeddings.class_embedding.grad
    assert gradient.abs().sum() > 0
