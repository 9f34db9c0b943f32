"""The text encoder reads every text once, and no further than its end, with the embeddings of all the padding."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig

from reccomp_hf.core.text_encoder import TokenRecoveryModules

LENGTH, LARGEST = 24, 49
TEXTS = [[5, 6, 7], [5, 6, 7], [8], [], [9, 10, 11, 12, 5]]


def modules(end):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(
        vocab_size=LARGEST + 1,
        max_position_embeddings=LENGTH,
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
    text, ids, seen = modules(end), padded(TEXTS, written, padding), []
    wanted = text.text_encoder(input_ids=ids.flatten(0, 1)).text_embeds
    text.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    found = text.embed_question(ids)
    torch.testing.assert_close(found, wanted.unsqueeze(1))
    assert [tuple(part.shape) for part in seen] == [(4, max(map(len, TEXTS)) + 2)]
    assert found[0].equal(found[1])
    assert not torch.allclose(found[0], found[2])


@torch.no_grad()
@pytest.mark.parametrize("padding", [LARGEST, 0])
def test_questions_are_pooled_at_their_last_place_on_request(padding):
    text, ids = modules(LARGEST), padded(TEXTS, LARGEST, padding)
    states = text.text_encoder(input_ids=ids.flatten(0, 1)).last_hidden_state
    wanted = states[:, LENGTH - 1] @ text.text_encoder.text_projection.weight.T
    found = text.embed_question(ids, "last").squeeze(1)
    torch.testing.assert_close(found, wanted)
    alone = torch.cat([text.embed_question(ids[row : row + 1], "last").squeeze(1) for row in range(len(ids))])
    torch.testing.assert_close(found, alone)
    assert found[0].equal(found[1])
    assert not torch.isclose(found, text.embed_question(ids).squeeze(1)).any(-1).all()


@torch.no_grad()
def test_windows_of_full_length_are_read_whole():
    text = modules(LARGEST)
    ids = padded([list(range(4, 4 + LENGTH - 2)), [5]], LARGEST, LARGEST).view(1, 2, LENGTH)
    wanted = text.text_encoder(input_ids=ids.flatten(0, 1)).text_embeds.unflatten(0, (1, 2))
    torch.testing.assert_close(text.embed_question(ids), wanted)
