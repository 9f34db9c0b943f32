"""A processor that several threads share: fast tokenizers keep their padding as a state of all threads."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from architectures import ROWS, call, each_architecture
from conversations import start

from reccomp_hf.core import tokenizing
from reccomp_hf.core.tokenizing import token_ids


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


@each_architecture
def test_threads_that_pad_and_cut_differently_get_their_own_rows(architecture, monkeypatch):
    conversation = start(architecture, "rebuild")
    processor, texts = conversation.processor, list(tiny.SENTENCES[:2])
    messages, many = [{"role": "user", "content": tiny.SENTENCES[0]}], call(ROWS)
    works = [
        lambda: processor(**many, return_tensors="pt", padding=True),
        lambda: processor(**many),
        lambda: processor(**many, padding="max_length", max_length=1500, padding_side="right"),
        lambda: processor(text=texts, recovery_text=texts, truncation=True, max_length=4),
        lambda: processor.encode_questions([question for question, _ in ROWS]),
        lambda: {"ids": conversation._ids(messages, [])},
        lambda: {"ids": token_ids(processor.tokenizer, texts, add_special_tokens=True)},
    ]
    expected = [work() for work in works]
    for tokenizer in (processor.tokenizer, processor.recovery_tokenizer):
        sets = tokenizer.set_truncation_and_padding

        def set_and_wait(*args, sets=sets, **kwargs):
            sets(*args, **kwargs)
            time.sleep(0.002)  # others run meanwhile

        monkeypatch.setattr(tokenizer, "set_truncation_and_padding", set_and_wait)
    with ThreadPoolExecutor(len(works)) as pool:
        for number, found in enumerate(pool.map(lambda number: works[number % len(works)](), range(10 * len(works)))):
            wanted = expected[number % len(works)]
            assert found.keys() == wanted.keys()
            for name in wanted:
                one, other = found[name], wanted[name]
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else repr(one) == repr(other)


@each_architecture
def test_a_call_leaves_the_processor_its_tokenizer(architecture):
    processor = architecture.processor()
    tokenizer = processor.tokenizer
    processor(**call(ROWS[:1]))
    assert processor.tokenizer is tokenizer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks():
    holds, ends = threading.Event(), threading.Event()

    def hold():
        with tokenizing._LOCK:
            holds.set()
            ends.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert holds.wait(60)
        child = os.fork()
        if not child:
            os._exit(0 if tokenizing._LOCK.acquire(timeout=10) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        ends.set()
        holder.join()


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_read_as_the_tokenizer_is_set(split):
    """A call that splits them leaves the backend so."""
    tokenizer = tiny.llm_tokenizer()
    tokenizer.split_special_tokens = split
    expected = tokenizer("a <image> b", add_special_tokens=False).input_ids
    tokenizer("a <image> b", split_special_tokens=not split)
    assert token_ids(tokenizer, ["a <image> b"]) == [expected]
