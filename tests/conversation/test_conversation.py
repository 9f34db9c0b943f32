"""`Conversation.ask`: streaming, failures, and the arguments that it refuses."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from architectures import LLAVA, each_architecture
from conversations import PICTURES, QUESTIONS, REWRITES, ask, each_mode, start
from PIL import Image
from transformers import GenerationConfig, LogitsProcessorList, TextIteratorStreamer, TextStreamer

from reccomp_hf import Conversation


@each_mode
def test_streams(mode, capsys):
    architecture = LLAVA
    conversation = start(architecture, mode)
    tokenizer = conversation.processor.tokenizer
    for question, images in ((QUESTIONS[0], PICTURES[0]), (QUESTIONS[1], None)):
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = conversation.ask(question, images, streamer=streamer, max_new_tokens=4)
        assert capsys.readouterr().out.strip() == answer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=10)
    assert conversation.ask(QUESTIONS[2], streamer=streamer, max_new_tokens=4) == "".join(streamer).strip()


@each_architecture
@each_mode
def test_a_question_that_failed_leaves_no_trace(architecture, mode):
    def fail(ids, scores):
        if ids.shape[1] > stop:
            raise RuntimeError("interrupted")
        return scores

    whole, torn = (start(architecture, mode, {"budget": 24}) for _ in range(2))
    for number, question in enumerate(QUESTIONS):
        images = PICTURES[number] if number < 2 else None
        for stop in (0, 10**6):  # noqa: B007 fail reads it
            with contextlib.suppress(RuntimeError):
                ids = ask(torn, question, images, logits_processor=LogitsProcessorList([fail]))
        assert ids == ask(whole, question, images)
        assert len(torn.turns) == number + 1
        assert dataclasses.astuple(torn.turns[-1])[:6] == dataclasses.astuple(whole.turns[-1])[:6]


@pytest.mark.parametrize("text", [None, 5, [], b"x"], ids=str)
def test_a_question_that_is_no_text_is_refused(text):
    with pytest.raises(ValueError, match=r"A question must be a text, got \w+"):
        start(LLAVA, "append").ask(text, PICTURES[0])


def test_greyscale_of_16_bits_is_read_as_that_of_8():
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).round()
    tokens = []
    for values in (grey.astype(np.uint8), (grey * 257).astype(np.uint16)):
        conversation = start(LLAVA, "append")
        ask(conversation, QUESTIONS[0], Image.fromarray(values))
        tokens.append(conversation.turns[0].records[0].tokens)
    torch.testing.assert_close(*tokens, rtol=1e-5, atol=1e-5)


@each_architecture
def test_a_template_that_rewrites_earlier_turns(architecture):
    for mode in ("append", "keep"):
        conversation = start(architecture, mode, template=REWRITES)
        ask(conversation, QUESTIONS[0], PICTURES[0])
        length = conversation.turns[0].cache_length
        with pytest.raises(ValueError, match=r"writes an earlier turn differently, from token 1 of.*mode='rebuild'"):
            ask(conversation, QUESTIONS[1])
        assert len(conversation._cache) == length
    conversation = start(architecture, "rebuild", template=REWRITES)
    ask(conversation, QUESTIONS[0], PICTURES[0])
    ask(conversation, QUESTIONS[1])


def test_what_a_conversation_refuses():
    model, processor = LLAVA.compressed(), LLAVA.processor()
    new = functools.partial(Conversation, model, processor)
    with pytest.raises(ValueError, match="mode must be one of 'rebuild', 'append', 'keep', got 'add'"):
        new("add")
    with pytest.raises(ValueError, match="max_visual_tokens must be at least 1 and needs mode='append', got 9 and 'k"):
        new("keep", max_visual_tokens=9)
    with pytest.raises(ValueError, match=r"must be at least 1.*got 0"):
        new("append", max_visual_tokens=0)
    with pytest.raises(ValueError, match="tokens of method 'authors' have none: use mode='rebuild' or 'keep'"):
        new("append", {"method": "authors", "budget": None})
    with pytest.raises(ValueError, match="Unknown token_recovery field 'budgit'"):
        new("keep", {"budgit": 3})
    with pytest.raises(ValueError, match="needs a chat template"):
        Conversation(model, LLAVA.processor(chat_template=None))
    conversation = new("keep")
    refused = {
        "ask sets attention_mask itself": {"attention_mask": 1},
        "past_key_values does not work": {"past_key_values": 3},
        "cache does not work": {"cache": 3},
        "ask sets input_ids itself": {"input_ids": 1},
        "ask sets token_recovery itself": {"token_recovery": {}},
        "max_length would include the tokens that a turn reads: use max_new_tokens": {"max_length": 9},
        "A question has one answer": {"num_return_sequences": 2},
        "num_beams does not work with the cache that mode='keep' keeps": {"num_beams": 2},
        "use_cache does not work": {"use_cache": False},
        "prompt_lookup_num_tokens does not work": {"prompt_lookup_num_tokens": 2},
        r"num_beams .*keeps: leave it out, or use mode='rebuild'": {
            "generation_config": GenerationConfig(num_beams=2)
        },
    }
    for match, options in refused.items():
        with pytest.raises(ValueError, match=match):
            conversation.ask(QUESTIONS[0], PICTURES[0], **options)
    with pytest.raises(ValueError, match="has 1 images, but the chat template writes '<image>' 2 times"):
        conversation.ask("What is <image>?", PICTURES[0])
    with pytest.raises(ValueError, match="has an image but no question"):
        conversation.ask("", PICTURES[0])
    assert conversation.turns == []
    assert new("rebuild").ask(QUESTIONS[0], PICTURES[0], num_beams=2, max_new_tokens=3)
