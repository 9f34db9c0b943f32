"""The text encoder reads every text once, and no further than its end, with the embeddings of all the padding."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import LONG_QUESTION, each_architecture, generate
from fixed_budgets import BALANCED
from prefill_elsewhere import model_elsewhere
from tape import TapeRecorder
from transformers import CLIPTextConfig

from reccomp_hf.core.graphs import GraphCache
from reccomp_hf.core.text_encoder import TokenRecoveryModules

LENGTH, LARGEST = 24, 49
TEXTS = [[5, 6, 7], [5, 6, 7], [8], [], [9, 10, 11, 12, 5]]


def modules(end, length=LENGTH):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(
        vocab_size=LARGEST + 1,
        max_position_embeddings=length,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=end,
        pad_token_id=LARGEST,
        **sizes,
    )
    torch.manual_seed(0)
    return TokenRecoveryModules(config, 8).eval()


def padded(texts, end, padding):
    """(rows, 1, LENGTH) ids of texts between start and end of text."""
    return torch.tensor([[[1, *text, end] + [padding] * (LENGTH - 2 - len(text))] for text in texts])


@torch.no_grad()
@pytest.mark.parametrize(
    ("end", "written", "padding"),
    [(LARGEST, LARGEST, LARGEST), (LARGEST, LARGEST, 0), (2, LARGEST, LARGEST), (2, LARGEST, 0), (3, 3, 0)],
    ids=["end as padding", "own padding", "largest id, end as padding", "largest id, own padding", "a low id"],
)
def test_questions_are_read_once_and_to_their_end(end, written, padding):
    text, ids = modules(end), padded(TEXTS, written, padding)
    wanted = text.text_encoder(input_ids=ids.flatten(0, 1)).text_embeds
    torch.testing.assert_close(text.embed_question(ids), wanted.unsqueeze(1))
    for rounded, length in ((False, max(map(len, TEXTS)) + 2), (True, 8)):
        texts, of_window = text.distinct_texts(ids, rounded=rounded)
        assert texts.shape == (4, length) and of_window.shape == (len(TEXTS), 1)
        torch.testing.assert_close(text.embed_question(texts.unsqueeze(1)).squeeze(1)[of_window], wanted.unsqueeze(1))
        assert of_window[0].equal(of_window[1]) and not of_window[0].equal(of_window[2])


def test_shapes_of_texts_are_few():
    text, shapes = modules(LARGEST), {}
    for different in range(1, 8):
        for length in range(1, LENGTH - 1):
            rows = [[5 + row] * length for row in range(different)] + [[5] * length] * (7 - different)
            texts, of_window = text.distinct_texts(padded(rows, LARGEST, LARGEST), rounded=True)
            shapes.setdefault(texts.shape, []).append((different, length))
            assert texts[of_window.squeeze(1)][:, 1 : length + 1].tolist() == rows
    assert {*shapes} == {(count, length) for count in (1, 2, 4, 7) for length in (8, 16, 24)}


def test_ids_that_the_text_encoder_lacks_are_refused():
    with pytest.raises(ValueError, match="recovery_input_ids must be ids from 0 to 49, got 1 to 50"):
        modules(LARGEST).distinct_texts(torch.tensor([[[1, 50, 49]]]))


@torch.no_grad()
@pytest.mark.parametrize("padding", [LARGEST, 0])
def test_questions_are_pooled_at_their_last_place_on_request(padding):
    text, ids = modules(LARGEST), padded(TEXTS, LARGEST, padding)
    states = text.text_encoder(input_ids=ids.flatten(0, 1)).last_hidden_state
    wanted = states[:, LENGTH - 1] @ text.text_encoder.text_projection.weight.T
    found = text.embed_question(ids, "last").squeeze(1)
    torch.testing.assert_close(found, wanted)
    texts, of_window = text.distinct_texts(ids, "last")
    assert texts.shape == (4, LENGTH)
    torch.testing.assert_close(text.embed_question(texts.unsqueeze(1), "last")[of_window.squeeze(1)].squeeze(1), found)
    assert not torch.isclose(found, text.embed_question(ids).squeeze(1)).any(-1).all()


@torch.no_grad()
def test_windows_of_full_length_are_read_whole():
    text = modules(LARGEST)
    ids = padded([list(range(4, 4 + LENGTH - 2)), [5]], LARGEST, LARGEST).view(1, 2, LENGTH)
    wanted = text.text_encoder(input_ids=ids.flatten(0, 1)).text_embeds.unflatten(0, (1, 2))
    torch.testing.assert_close(text.embed_question(ids), wanted)
    assert text.distinct_texts(ids, rounded=True)[0].shape == (2, LENGTH)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["end", "last"])
@pytest.mark.parametrize(
    ("end", "padding"), [(LARGEST, LARGEST), (LARGEST, 0), (2, LARGEST)], ids=["end", "own padding", "largest id"]
)
def test_padding_that_is_cut_changes_no_embedding(end, padding, pooling):
    """From 8 tokens to CLIP's 77, as a batch of the processor is cut."""
    text, generator = modules(end, 77), torch.Generator().manual_seed(0)
    for length in range(8, 78):
        longest = length - (padding != LARGEST and length < 77)  # the last place shows the padding
        ids = torch.full((2, 1, 77), padding)
        for row, tokens in enumerate((longest, 5)):
            words = torch.randint(4, LARGEST - 1, (tokens - 2,), generator=generator)
            ids[row, 0, :tokens] = torch.tensor([1, *words, LARGEST])
        found, wanted = (text.embed_question(given, pooling) for given in (ids[..., :length], ids))
        torch.testing.assert_close(found, wanted)
        assert not torch.isclose(found[0], found[1]).all()


# ---- in the models -------------------------------------------------------------------------------------------------


def texts_read(model):
    """Shapes of the texts of the recordings of the front."""
    return [tuple(one.inputs["question"].shape) for key, one in model._graphs._recordings.items() if key[0] == "front"]


@pytest.mark.parametrize("fields", [BALANCED, {"budget": 16}], ids=["balanced", "paper"])
@each_architecture
def test_recordings_read_texts_once_and_to_their_end(architecture, fields):
    """Equal questions are one text; questions of about the same length share a recording; answers stay the same."""
    model = copy.deepcopy(architecture.compressed())
    model._graphs = GraphCache(recorder=TapeRecorder())
    cases = {
        "equal": ([("Is it red?", 1)] * 3, 1),
        "other": ([("Is it tan?", 1)] * 3, 1),
        "different": ([("Is it red?", 1), ("Is it tan?", 1), ("Is it red?", 1)], 2),
        "long": ([(LONG_QUESTION, 1)], 3),
    }
    for rows, texts in cases.values():
        batch = architecture.encode(rows)
        found = generate(model, batch, token_recovery=fields)
        assert found.equal(generate(architecture.compressed(), batch, token_recovery=fields))
        assert texts_read(model)[-1] == (texts, 1, 77 if rows == [(LONG_QUESTION, 1)] else 8)
    assert len(texts_read(model)) == 3


@pytest.mark.parametrize("fields", [BALANCED, {"method": "authors"}], ids=["balanced", "authors"])
@each_architecture
def test_questions_without_their_padding_choose_the_same_tokens(architecture, fields):
    """As older code wrote it, a window always has the encoder's length."""
    model, batch = architecture.compressed(), architecture.encode([("Is it red?", 1), ("Is it dark tan?", 1)])
    ids, mask = batch["recovery_input_ids"], batch["recovery_attention_mask"]
    whole = {
        "recovery_input_ids": torch.nn.functional.pad(ids, (0, 77 - ids.shape[-1]), value=ids.max()),
        "recovery_attention_mask": torch.nn.functional.pad(mask, (0, 77 - ids.shape[-1])),
    }
    assert ids.shape == (2, 1, 16)
    found, wanted = (model.recover(**given, token_recovery=fields) for given in (batch, {**batch, **whole}))
    for one, other in zip(found, wanted, strict=True):
        assert one.cluster.equal(other.cluster) and one.places.equal(other.places)
        torch.testing.assert_close(one.text_similarity, other.text_similarity)


@pytest.mark.parametrize(
    ("fields", "length"), [(BALANCED, 16), ({"method": "authors"}, 77)], ids=["balanced", "authors"]
)
@each_architecture
def test_a_device_reads_no_further_than_the_longest_question(architecture, fields, length):
    """The shape of the processor's ids says it: nothing is read from the device."""
    read, batch = [], architecture.encode([("Is it red?", 1), ("Is it dark tan?", 1)])
    with model_elsewhere(architecture, batch, fields) as (model, inputs, _):
        model.token_recovery.text_encoder.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        model.compress_inputs(**inputs, token_recovery=fields)
    assert read == [(2, length)]
