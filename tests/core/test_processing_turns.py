"""Selection of the turns that give the question, from chat messages and from rendered prompts."""

import json

import pytest
import tiny
from templates import EACH, QUESTION, RECOVERY_NAMES, TEMPLATES, UNUSABLE_TEMPLATES, clip_windows
from tiny import turn

from reccomp_hf.core import questions
from reccomp_hf.core.processing import LlavaNextRecCompProcessor

PICTURE = tiny.pictures(1)
FIRST, SECOND = "Is this a cat?", "Why? Tell me more."
CONVERSATION = [
    turn("system", "Be brief."),
    turn("user", FIRST, PICTURE),
    turn("assistant", "Yes, a red one."),
    turn("user", f"{SECOND}\n{questions.ANSWER_INSTRUCTIONS[0]}"),
    turn("assistant", "Ears."),
    turn("user", QUESTION),
]
QUESTIONS = {"last": [QUESTION], "all": [FIRST, SECOND, QUESTION]}
# The answer stands behind the question with nothing that a prompt for an answer would end in.
ENDS_BEHIND_THE_QUESTION = EACH + (
    "{{ 'Q: ' if message['role'] == 'user' else 'A: ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\n"
    "{% endfor %}"
)
MORE_TEMPLATES = {**TEMPLATES, "ends behind the question": ENDS_BEHIND_THE_QUESTION}
WITHOUT_SYSTEM = CONVERSATION[1:]
ENCODED = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
each_turns = pytest.mark.parametrize("turns", ["last", "all"])


@each_turns
@pytest.mark.parametrize("name", MORE_TEMPLATES)
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("answered", [True, False])
def test_rendered_prompts(name, turns, asks, answered):
    messages = WITHOUT_SYSTEM if name.startswith("ends") else CONVERSATION
    messages = [*messages, turn("assistant", "Blue.")] if answered else messages
    processor = tiny.recovery_processor(chat_template=MORE_TEMPLATES[name], recovery_turns=turns)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=asks and not answered)
    assert processor.extract_questions(prompt) == QUESTIONS[turns]
    assert processor.extract_question(prompt) == QUESTION


@each_turns
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_and_rendered_prompts_agree(name, turns):
    processor = tiny.recovery_processor(chat_template=TEMPLATES[name], recovery_turns=turns)
    chat = processor.apply_chat_template(CONVERSATION, **ENCODED)
    assert chat["recovery_input_ids"] == [clip_windows(*QUESTIONS[turns])[0]]
    prompt = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    rendered = processor(images=PICTURE, text=prompt)
    assert [rendered[key] for key in RECOVERY_NAMES] == [chat[key] for key in RECOVERY_NAMES]
    assert processor.questions_of(CONVERSATION) == QUESTIONS[turns]


@pytest.mark.parametrize("nested", [False, True])
def test_a_call_may_name_the_turns_of_the_question(nested):
    processor = tiny.recovery_processor()
    prompt = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert processor(images=PICTURE, text=prompt)["recovery_input_ids"] == [clip_windows(QUESTION)[0]]
    rendered = processor(images=PICTURE, text=prompt, recovery_turns="all")
    assert rendered["recovery_input_ids"] == [clip_windows(*QUESTIONS["all"])[0]]
    options = {"processor_kwargs": {"recovery_turns": "all"}} if nested else {"recovery_turns": "all"}
    chat = processor.apply_chat_template(CONVERSATION, **ENCODED, **options)
    assert chat["recovery_input_ids"] == [clip_windows(*QUESTIONS["all"])[0]]
    assert processor.recovery_turns == "last"
    assert processor.extract_questions(prompt, "all") == QUESTIONS["all"]


def test_a_long_question_shares_no_window_with_another():
    long = " ".join(["cat"] * 80)
    processor = tiny.recovery_processor(recovery_turns="all")
    fields = processor.encode_questions([[FIRST, long], QUESTION, []])
    ids, mask, _ = (fields[name] for name in RECOVERY_NAMES)
    assert ids.shape == (3, 3, 77)
    assert ids[0].tolist() == clip_windows(FIRST, long)[0]
    assert ids[1, :1].tolist() == clip_windows(QUESTION, long)[0][:1]
    assert (mask.sum(-1) > 0).tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert tiny.recovery_processor(recovery_tokenizer=None).encode_questions([QUESTION]) == {}


@pytest.mark.parametrize("empty", ["", " ", questions.ANSWER_INSTRUCTIONS[1]])
def test_turns_without_a_question_are_left_out(empty):
    processor = tiny.recovery_processor(recovery_turns="all")
    messages = [turn("user", empty, PICTURE), turn("assistant", "Well?"), turn("user", QUESTION)]
    for encoding in (
        processor.apply_chat_template(messages, **ENCODED),
        processor(images=PICTURE, text=processor.apply_chat_template(messages, add_generation_prompt=True)),
    ):
        assert encoding["recovery_input_ids"] == [clip_windows(QUESTION)[0]]
    # A picture that comes without a word is asked about by the turns before it.
    messages = [turn("user", FIRST), turn("assistant", "Show me."), turn("user", empty, PICTURE)]
    assert processor.apply_chat_template(messages, **ENCODED)["recovery_input_ids"] == [clip_windows(FIRST)[0]]
    with pytest.raises(ValueError, match="Row 0 has an image but no question"):
        processor.apply_chat_template(messages, **ENCODED, recovery_turns="last")


def test_rows_of_a_batch_have_their_own_turns():
    processor = tiny.recovery_processor(recovery_turns="all")
    rows = [CONVERSATION, [turn("user", "Hello.")]]
    options = {"text_kwargs": {"padding": True}}
    encoding = processor.apply_chat_template(rows, **ENCODED, return_tensors="pt", processor_kwargs=options)
    assert encoding["recovery_attention_mask"].any(-1).tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("given_text", [[[FIRST, QUESTION]], [(FIRST, " ", QUESTION)]])
def test_several_questions_may_be_given(given_text):
    encoding = tiny.recovery_processor()(text="USER: Hello ASSISTANT:", recovery_text=given_text)
    assert encoding["recovery_input_ids"] == [clip_windows(FIRST, QUESTION)[0]]


@pytest.mark.parametrize("name", UNUSABLE_TEMPLATES)
def test_without_markers_the_whole_prompt_is_the_question(name):
    processor = tiny.recovery_processor(chat_template=UNUSABLE_TEMPLATES[name], recovery_turns="all")
    assert processor.extract_questions(" Hello <image>\nwhat? ") == ["Hello \nwhat?"]


@pytest.mark.parametrize("cls", [None, LlavaNextRecCompProcessor])
@each_turns
def test_the_turns_are_saved(cls, turns, tmp_path):
    processor = tiny.recovery_processor(cls, recovery_turns=turns)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["recovery_turns"] == turns
    assert type(processor).from_pretrained(tmp_path).recovery_turns == turns
    assert type(processor).from_pretrained(tmp_path, recovery_turns="all").recovery_turns == "all"
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["recovery_turns"]  # as it was written before there was a choice
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    assert type(processor).from_pretrained(tmp_path).recovery_turns == "last"


def test_unknown_turns():
    match = "recovery_turns must be 'last' or 'all', got 'first'"
    with pytest.raises(ValueError, match=match):
        tiny.recovery_processor(recovery_turns="first")
    processor = tiny.recovery_processor()
    with pytest.raises(ValueError, match=match):
        processor(text="USER: Hello ASSISTANT:", recovery_turns="first")
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template([turn("user", QUESTION)], tokenize=True, recovery_turns="first")


def test_questions_of_rendered_prompts():
    processor = tiny.recovery_processor()
    prompt = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert processor.questions_of_prompts([prompt, "<image>Hello?"]) == [[QUESTION], ["Hello?"]]
    assert processor.questions_of_prompts([prompt], recovery_turns="all") == [QUESTIONS["all"]]
    assert processor.questions_of_prompts([prompt, prompt], ["One?", ["Two?", " "]]) == [["One?"], ["Two?"]]
    with pytest.raises(ValueError, match=r"one question per row: got 1, expected 2"):
        processor.questions_of_prompts([prompt, prompt], ["One?"])
    with pytest.raises(ValueError, match=r"Row 1 has an image but no question"):
        processor.questions_of_prompts(["Hello?", "<image>"])


CHATS = {
    "empty": ([], "A chat must be a list of at least one message .* got \\[\\]"),
    "an empty row": ([[]], "A chat must be a list of at least one message .* got \\[\\]"),
    "none": (None, "A chat must be a list of at least one message .* got None"),
    "a text": ("hi", "A chat must be a list of at least one message .* got 'hi'"),
    "texts": (["hi"], "Message 0 of a chat needs a role .* got 'hi'"),
    "no role": (
        [turn("user", "Hello."), {"content": "hi"}],
        "Message 1 of a chat needs a role .* got {'content': 'hi'}",
    ),
    "role none": ([{"role": None, "content": "hi"}], "Message 0 of a chat needs a role"),
    "a number": ([{"role": "user", "content": 5}], "The content of message 0 of a chat must be a text or .* got 5"),
    "parts": ([[{"role": "user", "content": ["hi"]}]], "The content of message 0 of a chat must be .* got \\['hi'\\]"),
}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(("chat", "message"), CHATS.values(), ids=CHATS)
def test_malformed_chats_are_refused(chat, message, tokenize):
    processor = tiny.recovery_processor()
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat, tokenize=tokenize)
    with pytest.raises(ValueError, match=message):
        processor.questions_of(chat[0] if isinstance(chat, list) and chat and isinstance(chat[0], list) else chat)


@pytest.mark.parametrize("images", [[], (), [[]], [[], []]], ids=str)
@pytest.mark.parametrize("text", ["USER: hi ASSISTANT:", "USER: <image>\nhi ASSISTANT:"])
def test_a_list_of_no_images_is_refused(images, text):
    with pytest.raises(ValueError, match=r"images must hold at least one image, got .*pass images=None"):
        tiny.recovery_processor()(images=images, text=text)
