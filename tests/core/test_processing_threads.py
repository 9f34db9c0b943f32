"""A processor that several threads share: fast tokenizers keep their padding as a state of all threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from architectures import ROWS, call, each_architecture

from reccomp_hf.core.words import token_ids


@each_architecture
def test_an_encoded_question_leaves_the_padding_as_it_is(architecture):
    """Setting it would fail in transformers 4.57, or change the rows of another thread."""
    processor = architecture.processor()
    expected = architecture.encode(ROWS)
    backend = processor.tokenizer.backend_tokenizer
    for padding in ({"direction": "left", "pad_id": 0, "pad_token": "<pad>"}, None):
        backend.enable_padding(**padding) if padding else backend.no_padding()
        state = backend.padding
        fields = processor.encode_questions([question for question, _ in ROWS])
        assert backend.padding == state
        assert torch.equal(fields["recovery_words"], expected["recovery_words"])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_those_of_a_call_whatever_the_padding(side, special):
    texts = [*tiny.SENTENCES, "cat", ""]
    expected = tiny.llm_tokenizer()(texts, add_special_tokens=special).input_ids
    tokenizer = tiny.llm_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(direction=side, pad_id=0, pad_token="<pad>")
    assert token_ids(tokenizer, texts, special) == expected
    backend.enable_truncation(1)
    assert token_ids(tokenizer, texts, special) == expected
    assert token_ids(tokenizer, []) == []


@each_architecture
def test_threads_that_share_a_processor_get_their_own_rows(architecture):
    processor = architecture.processor()
    batches = [ROWS, ROWS[:1], ROWS[::-1]]
    expected = [architecture.encode(rows) for rows in batches]

    def encode(number):
        return processor(**call(batches[number % len(batches)]), return_tensors="pt", padding=True)

    encode(0)  # sets the padding, which all calls share
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(encode, range(120))):
            wanted = expected[number % len(batches)]
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
