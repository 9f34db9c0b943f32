"""Methods on features of real towers: attention that patches receive, and choices on pictures of the demo model."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from architectures import each_architecture
from demo_model import demo_model
from oracle_methods import OPTIONS, method_oracles

from reccomp_hf import RecoveryMethod, TokenRecoveryConfig
from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.methods import registry
from reccomp_hf.core.methods.registry import get_method
from reccomp_hf.core.relevance import received_attention
from reccomp_hf.core.vision import vision_states
from reccomp_hf.demo import draw_scene

SCENES = (3_000_000, 3_000_002)
BUDGETS = (1, 7, 22, 36, 143, 0.8)


def tower_and_states(batch=2):
    """A random CLIP's vision tower with eager attention, its blocks' inputs and its attention weights."""
    clip = tiny.clip_model(seed=3)
    clip.vision_model.config._attn_implementation = "eager"
    size = clip.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    tower = clip_vision_model(clip.vision_model)
    blocks = tower.encoder.layers
    states = vision_states(tower, pixels, set(range(len(blocks) + 1)))
    weights = [
        block.self_attn(block.layer_norm1(states[index]), attention_mask=None, output_attentions=True)[1]
        for index, block in enumerate(blocks)
    ]
    return tower, states, weights, clip.config.vision_config.num_attention_heads


@torch.no_grad()
def test_received_attention_is_what_clip_computes():
    tower, states, weights, heads = tower_and_states()
    assert len(weights) > 2
    for index, block in enumerate(tower.encoder.layers):
        received = received_attention(block, states[index], heads, None)
        torch.testing.assert_close(received, weights[index].mean((1, 2))[:, 1:], rtol=1e-5, atol=1e-7)
        everything = torch.ones_like(received, dtype=torch.bool)
        torch.testing.assert_close(received_attention(block, states[index], heads, everything), received)


@torch.no_grad()
def test_missing_patches_neither_attend_nor_receive_attention():
    tower, states, _, heads = tower_and_states()
    block, states = tower.encoder.layers[1], states[1]
    valid = torch.rand(states[:, 1:, 0].shape, generator=torch.Generator().manual_seed(1)) > 0.4
    received = received_attention(block, states, heads, valid)
    assert not received[~valid].any()
    for row in range(len(states)):
        there = torch.cat([torch.tensor([True]), valid[row]])
        alone = received_attention(block, states[row : row + 1, there], heads, None)
        torch.testing.assert_close(received[row, valid[row]], alone[0])


@pytest.fixture
def seen(monkeypatch):
    """Features that the method `watch` was given; it keeps what the method of its name would."""
    features = []

    def select(found, settings):
        features.append(found)
        return get_method("visual").select(found, settings)

    watch = RecoveryMethod(
        select, budget="required", object_block=lambda settings, blocks: 1, defaults={"visual_layer": -2}
    )
    monkeypatch.setitem(registry._METHODS, "watch", watch)
    return features


@torch.no_grad()
@each_architecture
def test_a_method_sees_the_attention_of_two_blocks_if_it_asks(architecture, seen):
    model, batch = architecture.compressed(), architecture.encode()
    section = {"method": "watch", "budget": 7}
    model.recover(**batch, token_recovery=section)
    encoded = model.encode_images(batch["pixel_values"], batch.get("image_sizes"), token_recovery=section)
    blocks = clip_vision_model(model.model.vision_tower).encoder.layers
    heads, valid = model.config.vision_config.num_attention_heads, encoded.layout.valid
    for slot, index in enumerate((1, len(blocks) - 2)):
        expected = received_attention(blocks[index], encoded.states[index], heads, valid)
        torch.testing.assert_close(seen[0].received[:, slot], expected)
    assert not torch.allclose(seen[0].received[:, 0], seen[0].received[:, 1])
    with pytest.raises(ValueError, match=f"object_layer is 99, but the vision tower has {len(blocks)} blocks"):
        model.recover(
            **batch, token_recovery={"method": "hiprune", "budget": 7, "method_options": {"object_layer": 99}}
        )


@pytest.mark.parametrize(("blocks", "block"), [(24, 8), (12, 3), (8, 2), (4, 1), (1, 0)])
def test_hiprune_seeks_anchors_at_nine_24ths_of_the_depth(blocks, block):
    """The ninth of CLIP ViT-L's 24 blocks, counted from 0."""
    method, settings = get_method("hiprune"), TokenRecoveryConfig(method="hiprune", budget=8)
    assert method.object_block(settings, blocks) == block


@torch.no_grad()
@pytest.mark.parametrize("method", ["scope", "holov", "hiprune"])
def test_a_method_chooses_what_its_plain_loop_chooses_on_demo_pictures(method, seen):
    model, processor = demo_model()
    scenes = [draw_scene(seed) for seed in SCENES]
    prompts = ["USER: <image>\nHow many objects are there? ASSISTANT:"] * len(scenes)
    batch = processor(images=[scene.image for scene in scenes], text=prompts, return_tensors="pt")
    for budget in BUDGETS:
        section = {"method": method, "budget": budget}
        records = model.recover(**batch, token_recovery=section)
        model.recover(**batch, token_recovery={"method": "watch", "budget": budget, "visual_heads": "mean"})
        features, config = seen[-1], TokenRecoveryConfig(**section, method_options=OPTIONS.get(method, {}))
        h, keys = features.hidden_states.double().numpy(), features.keys.double().numpy()
        saliency = features.saliency("mean").numpy()
        rows = method_oracles(h, keys, saliency, None, config, received=features.received.double().numpy())
        count = budget if isinstance(budget, int) else math.floor(budget * 144 + 0.5)
        for record, row in zip(records, rows, strict=True):
            assert row["gap"] > 1e-9
            assert record.places.tolist() == [row["places"]]
            assert int(record.counts) == count
