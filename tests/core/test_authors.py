"""The `authors` method against outputs of the paper's released code (tests/data/golden)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ROWS, each_architecture
from cases import make_case
from golden import GOLDEN, load
from torch import Tensor

from reccomp_hf.core.choosing import recover_tokens
from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.features import TokenRecoveryOutput

BY_WIDTH = {width: [path for path in GOLDEN if f"_c{width}_" in path.name] for width in (128, 1024)}
INPUTS = ("hidden_states", "cls_query", "keys", "text_similarity")


def run(images: list[dict[str, Tensor]]) -> TokenRecoveryOutput:
    """The method on a batch of golden inputs."""
    h, q, keys, s = (torch.stack([image[name] for image in images]) for name in INPUTS)
    return recover_tokens(h[:, 1:], q, keys, s, TokenRecoveryConfig.from_preset("authors"))


def test_the_golden_files_are_here() -> None:
    assert len(BY_WIDTH[128]) == 6
    assert len(BY_WIDTH[1024]) == 1
    stages = [load(path)[1] for path in GOLDEN]
    assert any(stage["merged"] == 0 for stage in stages)
    assert all(s["total"] == s["visual"] + s["text"] + s["merged"] + (s["merged"] > 0) for s in stages)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_authors_gives_the_released_codes_tokens(path: Path) -> None:
    image, stages = load(path)
    output = run([image])
    assert output.tokens.shape == (1, *image["output"].shape)
    assert output.counts.tolist() == [stages["total"]]
    torch.testing.assert_close(output.tokens[0], image["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_authors_records_every_stage(path: Path) -> None:
    image, stages = load(path)
    output = run([image])
    assert int(output.visual_mask.sum()) == stages["visual"]
    assert int(output.text_mask.sum()) == stages["text"]
    assert int(output.centre_mask.sum()) == stages["merged"]
    assert not output.coverage_mask.any()
    total = output.visual_mask.long() + output.text_mask.long() + output.centre_mask.long()
    assert int(total.max()) == 1


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_authors_keeps_features_bit_for_bit_and_clusters_nothing_else(path: Path) -> None:
    image, stages = load(path)
    output = run([image])
    kept = (output.visual_mask | output.text_mask)[0].nonzero().flatten()
    assert len(kept) == stages["visual"] + stages["text"]
    assert torch.equal(output.tokens[0, : len(kept)], image["hidden_states"][1:][kept])
    assert torch.equal(output.cluster[0, kept], torch.arange(len(kept)))
    others = torch.ones(output.cluster.shape[1], dtype=torch.bool)
    others[kept] = False
    assert (output.cluster[0, others] == -1).all()


@pytest.mark.parametrize("width", BY_WIDTH)
def test_authors_batched_equals_single(width: int) -> None:
    images = [load(path)[0] for path in BY_WIDTH[width]]
    images += images[:1]
    output = run(images)
    assert output.counts.tolist() == [len(image["output"]) for image in images]
    for row, image in enumerate(images):
        alone, count = run([image]), int(output.counts[row])
        for name in ("visual_mask", "text_mask", "centre_mask", "cluster"):
            assert torch.equal(getattr(output, name)[row], getattr(alone, name)[0]), name
        assert torch.equal(output.places[row, :count], alone.places[0])
        torch.testing.assert_close(output.tokens[row, :count], alone.tokens[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.tokens[row, :count], image["output"], rtol=1e-5, atol=1e-5)
        assert not output.tokens[row, count:].any()


def test_a_centre_may_be_the_first_of_the_remaining_patches() -> None:
    """Then its own key is the first one: the released code counts a key's place among the remaining patches."""
    case, config = make_case(1, 64, 32, seed=57), TokenRecoveryConfig(method="authors")
    output = case.recover(config)
    rest, kept = (~output.kept_mask[0]).nonzero().flatten(), int(output.kept_mask.sum())
    first = int(rest[0])
    assert output.centre_mask[0, first]
    unit = torch.nn.functional.normalize(case.keys[0, 1:], dim=-1)[: len(rest)]
    lowest = case.text_similarity.amin()  # type: ignore[union-attr]
    similarity = torch.where(output.visual_mask, lowest, case.text_similarity)[0, rest]  # type: ignore[arg-type]
    near = (unit @ unit[0] + 50 * similarity)[1:].topk(32).indices + 1
    weights = output.saliency[0, rest[near]].unsqueeze(-1)
    expected = case.hidden_states[0, first] + (weights * case.hidden_states[0, rest[near]]).sum(0)
    (place,) = (output.places[0, kept:] == first).nonzero().flatten().tolist()
    torch.testing.assert_close(output.tokens[0, kept + place], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@each_architecture
def test_authors_pools_the_question_at_the_last_padded_place(architecture: Any) -> None:
    """As `CLIPTextModelWithProjection` of transformers gives it for a text padded to the longest length."""
    model, batch = architecture.compressed(), architecture.encode(ROWS[:2])
    encoder, cut = model.token_recovery.text_encoder, batch["recovery_input_ids"]
    length = encoder.config.max_position_embeddings
    assert cut.shape[1:] == (1, 24)
    ids = torch.nn.functional.pad(cut, (0, length - 24), value=encoder.config.eos_token_id)
    states = encoder(input_ids=ids.squeeze(1)).last_hidden_state
    width = model.token_recovery.visual_projection.out_features
    at_end = (ids.squeeze(1) == encoder.config.eos_token_id).int().argmax(-1)
    assert (at_end < ids.shape[-1] - 1).all()
    for pooling, places in (("last", torch.full_like(at_end, -1)), ("end", at_end)):
        text = encoder.text_projection(states[torch.arange(len(places)), places])
        section = {"method": "authors", "method_options": {"pooling": pooling}}
        encoded = model.encode_images(batch["pixel_values"], batch.get("image_sizes"), token_recovery=section)
        blocks = clip_vision_model(model.model.vision_tower).encoder.layers
        patches = model.token_recovery.visual_projection(encoded.states[len(blocks)][:, 1:])
        cosines = torch.nn.functional.cosine_similarity(patches.unsqueeze(2), text, dim=-1)  # (T, N, questions)
        found, tile = model.recover(**batch, token_recovery=section), 0
        for record, question in zip(found, (0, 1, 1), strict=True):
            wanted = cosines[tile : tile + len(record.counts), :, question] / width**0.5
            torch.testing.assert_close(record.text_similarity, wanted, rtol=1e-4, atol=1e-6)
            tile += len(record.counts)
    default = model.recover(**batch, token_recovery={"method": "authors"})
    section = {"method": "authors", "method_options": {"pooling": "last"}}
    for one, other in zip(default, model.recover(**batch, token_recovery=section), strict=True):
        assert one.text_similarity.equal(other.text_similarity)


@torch.no_grad()
@each_architecture
def test_authors_scales_the_similarity_by_the_width_of_the_joint_space(architecture: Any) -> None:
    model, batch = architecture.compressed(), architecture.encode()
    width = model.token_recovery.visual_projection.out_features
    section = {"method": "authors", "method_options": {"pooling": "end"}}
    scaled, plain = (model.recover(**batch, token_recovery=one) for one in (section, {"method": "recoverable"}))
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one.text_similarity * width**0.5, other.text_similarity)


def test_another_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="pooling must be 'last' or 'end', got 'mean'"):
        TokenRecoveryConfig(method="authors", method_options={"pooling": "mean"})
