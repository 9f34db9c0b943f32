"""VisionZip and PruMerge+ restated from their published code's steps, on attention weights of CLIP's own blocks.

No tokens of their published code are at hand. The loops here start from what they start from: whole hidden states,
attention weights and keys, class token included. They share nothing with the package, nor with oracle_methods.py.
"""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from paths import DATA
from transformers import AutoModelForImageTextToText, AutoProcessor

from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.core.choosing import recover_tokens
from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.vision import vision_states
from reccomp_hf.demo import checkpoint_folder, draw_scene

NAMES = ("demo", "demo-global")
COMPACT = {"position_ids": "compact"}
NEAR = 1e-6  # nearer to each other, two scores may be ordered by rounding


def visionzip_tokens(states, attention, keys, dominant, contextual):
    """Tokens (dominant + contextual, C) of an image.

    `states` (N + 1, C) and `keys` (N + 1, C / H), the means over heads, begin with the class token; `attention` (N,)
    is the sum over heads of what it pays to every patch. The class token is one of the `dominant` tokens.
    """
    by_attention = sorted(range(len(attention)), key=lambda patch: -attention[patch])
    chosen = [0, *sorted(1 + patch for patch in by_attention[: dominant - 1])]
    rest = [place for place in range(len(states)) if place not in chosen]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    joined = {target: [] for target in targets}
    for place in rest:
        if place not in joined:
            likeness = [
                keys[place] @ keys[target] / np.linalg.norm(keys[place]) / np.linalg.norm(keys[target])
                for target in targets
            ]
            joined[targets[int(np.argmax(likeness))]].append(place)
    means = [sum(states[place] for place in joined[target]) / max(1, len(joined[target])) for target in targets]
    return np.stack([*states[chosen], *(states[target] + mean for target, mean in zip(targets, means, strict=True))])


def prumerge_plus_centres(attention):
    """Patches around which tokens are made, in their order: outliers in falling attention, then evenly spread ones."""
    low, high = np.percentile(attention, 25), np.percentile(attention, 75)
    count = int((attention > high + 1.5 * (high - low)).sum())
    outliers = sorted(range(len(attention)), key=lambda patch: -attention[patch])[:count]
    step = int(int(len(attention) / count) / 3)
    return outliers + [patch for patch in range(0, len(attention) - 1, step) if patch not in outliers]


def prumerge_plus_tokens(patches, attention, keys):
    """Tokens of an image: each centre with its 32 neighbours by key, then everything else in one token."""
    centres, tokens = prumerge_plus_centres(attention), []
    for centre in centres:
        others = [patch for patch in range(len(patches)) if patch != centre]
        likeness = {
            patch: keys[patch] @ keys[centre] / np.linalg.norm(keys[patch]) / np.linalg.norm(keys[centre])
            for patch in others
        }
        near = sorted(others, key=lambda patch: -likeness[patch])[:32]
        tokens.append(patches[centre] + sum(attention[patch] * patches[patch] for patch in near))
    rest = [patch for patch in range(len(patches)) if patch not in centres]
    return np.stack([*tokens, sum(attention[patch] * patches[patch] for patch in rest)])


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_visionzip_by_hand():
    states = np.eye(7)
    keys = np.array([[1, 0], [1, 0], [0, 2], [3, 0.1], [0, 1], [9, 0], [0.1, 5]])
    tokens = visionzip_tokens(states, np.array([1, 2, 9, 3, 8, 4]), keys, dominant=3, contextual=2)
    # The class token, patches 3 and 5 (by attention 9 and 8) in raster order; 1, 2, 4, 6 are left, every second one
    # of them is a target: 1 and 4. 2 and 6 have keys like that of 4.
    assert tokens.tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0.5, 0, 1, 0, 0.5],
    ]


def test_visionzip_of_64_tokens_keeps_53_patches():
    rng = np.random.default_rng(0)
    states, keys = rng.normal(size=(577, 8)), rng.normal(size=(577, 4))
    tokens = visionzip_tokens(states, rng.uniform(size=576), keys, dominant=54, contextual=10)
    rows = {row.tobytes() for row in states}
    assert len(tokens) == 64
    assert [token.tobytes() in rows for token in tokens] == [True] * 54 + [False] * 10
    assert np.array_equal(tokens[0], states[0])


@pytest.mark.parametrize(
    ("outliers", "spread"),
    [
        (1, 3),  # every 192nd of 575
        (11, 34),  # every 17th
        (40, 144),  # every fourth
        (58, 192),  # every third
        (64, 192),
        (65, 288),  # every second
        (96, 288),
    ],
)
def test_prumerge_plus_spreads_many_centres(outliers, spread):
    attention = np.linspace(1, 1.01, 576)
    attention[1 : 6 * outliers : 6] = np.linspace(5, 6, outliers)
    centres = prumerge_plus_centres(attention)
    first, others = centres[:outliers], centres[outliers:]
    assert first == list(range(1, 6 * outliers, 6))[::-1]
    assert not set(first) & set(others)
    assert len(set(others) | {place for place in first if place % (others[1] - others[0]) == 0}) == spread
    assert others == sorted(others)
    assert 575 not in others


def test_prumerge_plus_keeps_251_tokens_for_58_outliers():
    attention = np.linspace(1, 1.01, 576)
    attention[1 : 6 * 58 : 6] = np.linspace(5, 6, 58)
    rng = np.random.default_rng(0)
    patches, keys = rng.normal(size=(576, 8)), rng.normal(size=(577, 8))
    class_query = np.zeros(8)
    class_query[0] = 1
    keys[:, 0] = 0  # the attention is given by the first channel alone
    keys[1:, 0] = np.log(attention) * 8**0.5
    shares = np.exp(np.append(0.0, np.log(attention)))
    expected = prumerge_plus_tokens(patches, shares[1:] / shares.sum(), keys[1:])
    assert len(expected) == 251  # 58 outliers, 192 others, and the extra one
    found = recover_tokens(
        *(torch.from_numpy(x)[None] for x in (patches, class_query, keys)),
        None,
        TokenRecoveryConfig(method="prumerge_plus"),
    )
    assert int(found.counts) == 251
    np.testing.assert_allclose(found.tokens[0].numpy(), expected, rtol=1e-4, atol=1e-5)


# ---- on the demo models --------------------------------------------------------------------------------------------


@functools.lru_cache
def scenes(name):
    """The model, its inputs for the golden scenes, and its tower's states, attention weights, keys and queries."""
    folder = checkpoint_folder(name)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(folder)
    cases = json.loads((DATA / "golden" / f"peers_{name}.json").read_text())
    images = [draw_scene(case["scene_seed"]).image for case in cases.values()]
    prompts = [f"USER: <image>\n{case['question']} ASSISTANT:" for case in cases.values()]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    tower = clip_vision_model(model.model.vision_tower)
    blocks = tower.encoder.layers
    with torch.no_grad():
        states = vision_states(tower, inputs["pixel_values"], set(range(len(blocks) + 1)))
        normed = [block.layer_norm1(states[index]) for index, block in enumerate(blocks)]
        weights = [
            block.self_attn(state, attention_mask=None, output_attentions=True)[1]
            for block, state in zip(blocks, normed, strict=True)
        ]
        keys = [block.self_attn.k_proj(state) for block, state in zip(blocks, normed, strict=True)]
        queries = [block.self_attn.q_proj(state) for block, state in zip(blocks, normed, strict=True)]
    count = len(blocks)
    read = [states[index].numpy().astype(float) for index in range(count + 1)]
    return model, inputs, read, [w.numpy().astype(float) for w in weights], keys, queries


@pytest.mark.parametrize("budget", [7, 14, 22, 36, 64])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_visionzip_makes_the_restated_tokens(name, budget):
    model, inputs, states, weights, keys, _ = scenes(name)
    heads, contextual = model.config.vision_config.num_attention_heads, 10 * budget // 64
    found = model.recover(**inputs, token_recovery={"method": "visionzip", "budget": budget, **COMPACT})
    for row, record in enumerate(found):
        attention = weights[-2][row, :, 0, 1:].sum(0)
        means = keys[-2][row].unflatten(-1, (heads, -1)).mean(1).numpy().astype(float)
        gaps = -np.diff(np.sort(attention)[::-1]) / attention.max()
        assert gaps[budget - contextual - 2] > NEAR
        tokens = visionzip_tokens(states[-2][row], attention, means, budget - contextual, contextual)
        np.testing.assert_allclose(record.tokens[0].numpy(), tokens, rtol=1e-4, atol=1e-4)
        assert record.places[0, 0] == -1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prumerge_plus_makes_the_restated_tokens(name):
    model, inputs, states, _, keys, queries = scenes(name)
    found = model.recover(**inputs, token_recovery={"method": "prumerge_plus", "budget": None, **COMPACT})
    counts = []
    for row, record in enumerate(found):
        logits = queries[-1][row].double() @ keys[-1][row].double().T / keys[-1].shape[-1] ** 0.5
        attention = logits.softmax(-1)[0, 1:].numpy()
        own = keys[-1][row, 1:].double().numpy()
        tokens = prumerge_plus_tokens(states[-2][row, 1:], attention, own)
        counts.append(len(tokens))
        assert int(record.counts) == len(tokens)
        np.testing.assert_allclose(record.tokens[0].numpy(), tokens, rtol=1e-4, atol=1e-4)
    assert max(counts) > 100
    assert len(set(counts)) > 1
