"""Original positions in vLLM's rows, without an engine."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reccomp_hf.engines.vllm.places import append_places, check_tables, place_tokens, prompt_positions, split_places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_place_passes_through_two_channels_exactly(dtype):
    places = torch.arange(40_000)
    tokens = torch.randn(len(places), 3).to(dtype)
    appended = append_places(tokens, places)
    assert (appended.shape, appended.dtype) == ((40_000, 5), dtype)
    found, again = split_places(appended)
    assert torch.equal(found, tokens)
    assert torch.equal(again, places)


@st.composite
def prompts(draw):
    """A prompt as a list of texts' lengths (int) and images (places of their tokens, number of placeholders)."""
    parts = []
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            parts.append(draw(st.integers(1, 5)))
            continue
        placeholders = draw(st.integers(1, 600))
        tokens = draw(st.integers(1, min(placeholders, 8)))
        # Merged tokens come last, so that places need not rise.
        places = draw(st.lists(st.integers(0, placeholders - 1), min_size=tokens, max_size=tokens, unique=True))
        parts.append((places, placeholders))
    return parts


@given(parts=prompts(), data=st.data())
def test_every_token_gets_its_position_in_the_uncompressed_prompt(parts, data):
    """However the prompt is divided into steps, and whatever of it a prefix cache holds."""
    wanted, images, features, length, position = [], [], [], 0, 0
    for part in parts:
        if isinstance(part, int):
            wanted += range(position, position + part)
            length, position = length + part, position + part
            continue
        places, placeholders = part
        wanted += [position + place for place in places]
        images.append((length, len(places), placeholders))
        features.append(append_places(torch.full((len(places), 2), float(length)), torch.tensor(places)))
        length, position = length + len(places), position + placeholders
    rows, added = prompt_positions(length, images)
    assert rows.dtype == torch.int64
    assert added == position - length
    cached = data.draw(st.integers(0, length - 1))
    cuts = sorted({cached, length, *data.draw(st.lists(st.integers(cached, length), max_size=3))})
    for start, end in itertools.pairwise(cuts):
        window = [
            one[max(start - first, 0) : end - first]
            for one, (first, count, _) in zip(features, images, strict=True)
            if first < end and first + count > start
        ]
        before = rows.clone()
        given, new, after = place_tokens(rows, window, start)
        assert torch.equal(rows, before)
        assert after == added
        assert [one.tolist() for one in given] == [one[:, :2].tolist() for one in window]
        assert new[0, start:end].tolist() == wanted[start:end]
        rows = new
    given, new, after = place_tokens(rows, [], length)  # while an answer is generated
    assert (given, after) == ([], added)
    assert torch.equal(new, rows)


def test_positions_of_text_alone_are_consecutive():
    rows, added = prompt_positions(4, [])
    assert (rows[0].tolist(), added) == ([0, 1, 2, 3], 0)


@pytest.mark.parametrize("lengths", [(), (7,), (16, 8)], ids=str)
def test_rotary_embeddings_that_are_too_short_are_refused(lengths):
    model = torch.nn.ModuleList(torch.nn.Module() for _ in lengths)
    for module, length in zip(model, lengths, strict=True):
        module.register_buffer("cos_sin_cache", torch.zeros(length, 2))
    with pytest.raises(ValueError, match=r"ModuleList has no rotary embedding of 9 positions.*compact"):
        check_tables(model, 9)
    if lengths:
        check_tables(model, min(lengths))
