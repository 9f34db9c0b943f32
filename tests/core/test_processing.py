import copy

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import (
    CHATML,
    MISTRAL,
    QUESTION,
    RECOVERY_NAMES,
    STRINGS_ONLY,
    TEMPLATES,
    UNUSABLE_TEMPLATES,
    clip_windows,
)
from tiny import turn

from reccomp_hf.core import processing, questions
from reccomp_hf.core.processing import LlavaNextRecCompProcessor

PICTURE = tiny.pictures(1)
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
PLAIN_PROMPT = "USER: Is the cat on the left? ASSISTANT:"


def plain(value):
    """Nested lists of numbers out of tensors, arrays, and dictionaries and ragged lists of them."""
    if hasattr(value, "items"):
        return {name: plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


def assert_same(ours, theirs):
    assert {name: type(value) for name, value in ours.items()} == {name: type(v) for name, v in theirs.items()}
    assert plain(ours) == plain(theirs)


@pytest.fixture
def logged():
    with tiny.logged_warnings() as messages:
        yield messages


# What the stock processor gives stays as it is


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"return_tensors": "pt", "padding": True},
        {"return_tensors": "np", "padding": "longest"},
        {"text_kwargs": {"padding": "max_length", "max_length": 150}},
        {"images_kwargs": {"do_normalize": False}, "return_tensors": "pt", "padding": True},
        {},
    ],
)
def test_stock_fields_are_equal(options, padding_side, with_tokenizer):
    given_options = copy.deepcopy(options)
    inputs = {"images": tiny.pictures(1), "text": [PROMPT, PLAIN_PROMPT]}
    expected = tiny.stock_processor(padding_side)(**inputs, **copy.deepcopy(options))
    tokenizer = tiny.clip_tokenizer() if with_tokenizer else None
    ours = tiny.recovery_processor(padding_side=padding_side, recovery_tokenizer=tokenizer)(**inputs, **options)
    added = [ours.pop(name, None) for name in RECOVERY_NAMES]
    assert all((field is not None) == with_tokenizer for field in added)
    assert_same(ours, expected)
    assert options == given_options


def test_next_fields_are_equal():
    inputs = {"images": tiny.pictures(2), "text": [PROMPT, PROMPT], "return_tensors": "pt", "padding": True}
    ours = tiny.recovery_processor(LlavaNextRecCompProcessor)(**inputs)
    assert [tuple(ours.pop(name).shape) for name in RECOVERY_NAMES] == [(2, 1, 16), (2, 1, 16), (2, 32)]
    assert_same(ours, tiny.stock_next_processor()(**inputs))


def test_images_alone_get_no_recovery_fields():
    assert list(tiny.recovery_processor().image_processor(tiny.pictures(1))) == ["pixel_values"]
    visual_only = tiny.recovery_processor(recovery_tokenizer=None)
    assert not {*RECOVERY_NAMES} & {*visual_only(tiny.pictures(1), PROMPT)}
    assert not {*RECOVERY_NAMES} & {*visual_only.model_input_names}
    assert visual_only.recovery_max_length is None


def test_model_input_names():
    assert tiny.recovery_processor().model_input_names == [*tiny.stock_processor().model_input_names, *RECOVERY_NAMES]


# The recovery fields


@pytest.mark.parametrize("words", [0, 1, 6, 7, 62, 63, 70, 71, 75, 76, 150, 151, 400])
def test_windows(words, logged):
    question = " ".join(["cat"] * words)
    encoding = tiny.recovery_processor()(text=PLAIN_PROMPT, recovery_text=question, return_tensors="pt")
    assert logged == []
    ids, mask, tokens = (encoding[name] for name in RECOVERY_NAMES)
    assert ids.dtype == mask.dtype == tokens.dtype == torch.int64
    assert ids.tolist() == [clip_windows(question)[0]]
    assert mask.tolist() == [clip_windows(question)[1]]


def test_rows_with_fewer_windows_get_empty_ones():
    questions = ["cat " * 100, "cat", ""]
    encoding = tiny.recovery_processor()(text=[PLAIN_PROMPT] * 3, recovery_text=questions, padding=True)
    ids, mask, words = (np.array(encoding[name]) for name in RECOVERY_NAMES)
    assert ids.shape == mask.shape == (3, 2, 77)
    assert mask.sum(-1).tolist() == [[77, 27], [3, 0], [0, 0]]
    assert (words >= 0).sum(-1).tolist() == [100 * (words[1] >= 0).sum(), (words[1] >= 0).sum(), 0]
    assert (ids[1, 1] == tiny.clip_tokenizer().pad_token_id).all()


@given(st.text(max_size=60), st.integers(3, 12))
def test_windows_hold_every_token_once(question, length):
    processor = tiny.recovery_processor(recovery_max_length=length)
    ids, mask = questions.encode_windows(processor.recovery_tokenizer, processor.recovery_max_length, [question])
    bodies = [row[: int(keep.sum())][1:-1] for row, keep in zip(ids[0], mask[0], strict=True)]
    whole = tiny.clip_tokenizer()(question, add_special_tokens=False)["input_ids"]
    assert [token for body in bodies for token in body] == whole
    assert ids.shape[-1] == min(length, 8 if len(whole) <= 6 else 16)


@pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_recovery_fields_have_the_type_asked_for(kind, expected):
    encoding = tiny.recovery_processor()(text=PLAIN_PROMPT, return_tensors=kind)
    assert all(isinstance(encoding[name], expected) for name in RECOVERY_NAMES)


@pytest.mark.parametrize(("longest", "shape"), [(77, (1, 1, 48)), (36, (1, 2, 36)), (5, (1, 14, 5))])
def test_length_of_another_text_encoder(longest, shape):
    """42 words are 44 tokens: 48 in one window, or windows as long as the encoder reads at most."""
    processor = tiny.recovery_processor(recovery_max_length=longest)
    encoding = processor(text=PLAIN_PROMPT, recovery_text="cat " * 42, return_tensors="pt")
    assert encoding["recovery_input_ids"].shape == encoding["recovery_attention_mask"].shape == shape


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "text_kwargs"])
def test_questions_are_padded_as_prompts_are_to_a_length(nested):
    """Rows of calls with `padding="max_length"` can be stacked."""
    processor, options = tiny.recovery_processor(), {"padding": "max_length", "max_length": 40}
    options = {"text_kwargs": options} if nested else options
    call = {"text": PLAIN_PROMPT, "return_tensors": "pt"}
    rows = [processor(**call, **options, recovery_text=text) for text in ("cat", "cat " * 42)]
    for row in rows:
        assert row["recovery_input_ids"].shape == row["recovery_attention_mask"].shape == (1, 1, 77)
        assert row["input_ids"].shape == (1, 40)
    short = processor(**call, recovery_text="cat")["recovery_input_ids"]
    assert questions.lengthened(short, 77).equal(rows[0]["recovery_input_ids"])


@pytest.mark.parametrize(("padding", "length"), [(None, 8), (0, 16)], ids=["end of text", "a token of its own"])
def test_the_last_place_of_a_short_window_shows_the_padding(padding, length):
    """6 words and both ends are 8 tokens; behind them only a padding of its own needs a place."""
    tokenizer = tiny.clip_tokenizer()
    tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
    ids, mask = questions.encode_windows(tokenizer, 77, [["cat " * 6, "cat"]])
    assert ids.shape == (1, 2, length) and mask.sum(-1).tolist() == [[8, 3]]
    assert ids[0, :, -1].tolist() == [tokenizer.eos_token_id if padding is None else padding] * 2
    whole = questions.lengthened(torch.from_numpy(ids), 77)
    assert whole.shape == (1, 2, 77) and whole[..., :length].equal(torch.from_numpy(ids))
    assert whole[..., length:].unique().tolist() == [ids[0, 0, -1]]
    assert questions.lengthened(whole, 77).equal(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recovery_tokenizer": None, "recovery_max_length": 77}, "recovery_max_length=77 needs a recovery_tokenizer"),
        ({"recovery_max_length": 2}, "at least 3.*got 2"),
        ({"recovery_tokenizer": tiny.llm_tokenizer()}, "77 for CLIP.*got 1000000"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.recovery_processor(**arguments)


# The question in a prompt


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [turn("user", QUESTION)],
        [turn("user", QUESTION, [None])],
        [turn("system", "Be brief."), turn("user", QUESTION, [None] * 2)],
        [turn("user", "Is this a cat?", [None]), turn("assistant", "Yes, a red one."), turn("user", QUESTION)],
        [
            turn("user", "Is this a cat?", [None]),
            turn("assistant", "Yes."),
            turn("user", "Why?"),
            turn("assistant", "Ears."),
            turn("user", QUESTION),
        ],
        [turn("user", QUESTION + "\nAnswer the question using a single word or phrase.", [None])],
        [turn("user", QUESTION + " Answer with the option's letter from the given choices directly.")],
    ],
)
def test_question_of_a_rendered_conversation(name, messages):
    processor = tiny.recovery_processor(chat_template=TEMPLATES[name])
    for asks in (True, False):
        prompt = processor.apply_chat_template(messages, add_generation_prompt=asks)
        assert processor.extract_question(prompt) == QUESTION
    answered = processor.apply_chat_template([*messages, turn("assistant", "It is blue.")])
    assert processor.extract_question(answered) == QUESTION


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("vicuna", PROMPT),
        ("vicuna", f"USER: <image>\n{QUESTION}\nASSISTANT:"),
        ("vicuna", f"A chat between a user and an assistant. USER: <image><image>\n{QUESTION}\nASSISTANT: The"),
        ("vicuna", f"USER: {QUESTION}\n<image>"),
        ("vicuna-newline", PROMPT),
        ("mistral", f"[INST] <image>\n{QUESTION} [/INST]"),
        ("mistral", f"<s>[INST] <image>\nHow many? [/INST] Two.</s> [INST] {QUESTION} [/INST]"),
        ("chatml", f"<|im_start|>user\n<image>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", f"<|start_header_id|>user<|end_header_id|>\n\n<image>{QUESTION}<|eot_id|>"),
    ],
)
def test_question_of_a_hand_written_prompt(name, prompt):
    assert tiny.recovery_processor(chat_template=TEMPLATES[name]).extract_question(prompt) == QUESTION


@pytest.mark.parametrize("name", UNUSABLE_TEMPLATES)
def test_without_markers_the_whole_prompt_is_the_question(name):
    processor = tiny.recovery_processor(chat_template=UNUSABLE_TEMPLATES[name])
    assert processor.extract_question(" Hello <image>\nwhat is it? ") == "Hello \nwhat is it?"


def test_prompt_without_the_opening_is_the_question():
    assert tiny.recovery_processor().extract_question(f"<image>{QUESTION}") == QUESTION


def test_template_for_plain_strings():
    processor = tiny.recovery_processor(chat_template={"default": STRINGS_ONLY})
    assert processor.extract_question(f"[system] Be brief. [end][user] <image>{QUESTION} [end]") == QUESTION


def test_markers_are_found_once_per_template(monkeypatch):
    calls = []
    find = questions.find_turn_markers
    monkeypatch.setattr(processing, "find_turn_markers", lambda render: calls.append(1) or find(render))
    processor = tiny.recovery_processor()
    processor(text=[PLAIN_PROMPT] * 3)
    assert len(calls) == 1
    processor.chat_template = MISTRAL
    assert processor.extract_question(f"[INST] {QUESTION} [/INST]") == QUESTION
    assert len(calls) == 2


@pytest.mark.parametrize("given_text", [QUESTION, [QUESTION]])
def test_recovery_text_takes_the_place_of_the_prompt(given_text):
    encoding = tiny.recovery_processor()(text="USER: Hello ASSISTANT:", recovery_text=given_text)
    assert encoding["recovery_input_ids"] == [clip_windows(QUESTION)[0]]


@pytest.mark.parametrize(("given_text", "count"), [("one", 1), (["a", "b", "c"], 3), ([], 0)])
def test_recovery_text_of_another_length(given_text, count):
    with pytest.raises(ValueError, match=f"one question per row: got {count}, expected 2"):
        tiny.recovery_processor()(text=[PLAIN_PROMPT] * 2, recovery_text=given_text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": [PLAIN_PROMPT, "USER: <image>\n ASSISTANT:"]},
        {"text": [PLAIN_PROMPT, PROMPT], "recovery_text": [QUESTION, " "]},
        {"text": [PLAIN_PROMPT, "USER: <image> Answer the question using a single word or phrase. ASSISTANT:"]},
    ],
)
def test_row_with_an_image_needs_a_question(arguments):
    with pytest.raises(ValueError, match=r"Row 1 has an image but no question.*USER: .*recovery_text="):
        tiny.recovery_processor()(images=tiny.pictures(1), **arguments)


def test_row_without_images_may_have_no_question():
    encoding = tiny.recovery_processor()(text="USER:  ASSISTANT:", return_tensors="pt")
    assert encoding["recovery_attention_mask"].sum() == 0
    assert encoding["recovery_input_ids"].shape == (1, 1, 8)


# Chat messages

CHATS = {
    "single": ([turn("user", QUESTION, PICTURE)], [QUESTION]),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a cat", "here?")]}],
        ["a cat here?"],
    ),
    "turns": ([turn("user", "How many?", PICTURE), turn("assistant", "Two."), turn("user", QUESTION)], [QUESTION]),
    "batch": (
        [[turn("user", QUESTION, PICTURE)], [turn("user", "Why is the sky blue?")]],
        [QUESTION, "Why is the sky blue?"],
    ),
    "instruction": ([turn("user", f"{QUESTION} {questions.ANSWER_INSTRUCTIONS[0]}", PICTURE)], [QUESTION]),
    "answered": ([turn("user", QUESTION, PICTURE), turn("assistant", "Blue.")], [QUESTION]),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_template_takes_the_last_user_turn(name, logged):
    conversation, questions = CHATS[name]
    before = copy.deepcopy(conversation)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    encoding = tiny.recovery_processor().apply_chat_template(conversation, **options)
    together = clip_windows(*questions)[0]
    assert encoding.pop("recovery_input_ids") == [[window] for window in together]
    del encoding["recovery_attention_mask"], encoding["recovery_words"]
    assert logged == []
    assert_same(encoding, tiny.stock_processor().apply_chat_template(conversation, **options))
    assert conversation == before


def test_chat_template_as_string_and_as_ids():
    processor, stock = tiny.recovery_processor(), tiny.stock_processor()
    messages = [turn("user", QUESTION, PICTURE)]
    for options in ({"tokenize": False, "add_generation_prompt": True}, {}, {"tokenize": True}):
        assert processor.apply_chat_template(messages, **options) == stock.apply_chat_template(messages, **options)


@pytest.mark.parametrize("nested", [False, True])
def test_chat_template_with_a_given_question(nested, logged):
    options = {"processor_kwargs": {"recovery_text": "Two cats?"}} if nested else {"recovery_text": "Two cats?"}
    given_options = copy.deepcopy(options)
    arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    encoding = tiny.recovery_processor().apply_chat_template([turn("user", QUESTION, PICTURE)], **arguments)
    assert encoding["recovery_input_ids"].tolist() == [clip_windows("Two cats?")[0]]
    assert (options, logged) == (given_options, [])


def test_chat_template_pads_a_batch_through_processor_kwargs():
    options = {"text_kwargs": {"padding": True}}
    encoding = tiny.recovery_processor().apply_chat_template(
        CHATS["batch"][0], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    assert len({row.shape for row in encoding["input_ids"]}) == 1
    assert options == {"text_kwargs": {"padding": True}}


def test_chat_template_takes_plain_strings():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    encoding = tiny.recovery_processor(chat_template=CHATML).apply_chat_template(
        messages, tokenize=True, return_dict=True
    )
    assert encoding["recovery_input_ids"] == [clip_windows(QUESTION)[0]]
    assert isinstance(messages[0]["content"], str)


def test_chat_with_an_image_and_no_text_is_refused():
    with pytest.raises(ValueError, match="Row 0 has an image but no question"):
        tiny.recovery_processor().apply_chat_template([turn("user", "", PICTURE)], tokenize=True)
