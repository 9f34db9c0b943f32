"""A conversation: what each mode reads, keeps and answers, against plain calls on the whole of it."""

import contextlib
import dataclasses
import functools

import pytest
import tiny
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture, greedy_by_hand
from transformers import GenerationConfig, LogitsProcessorList, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from reccomp_hf import Conversation

PICTURES = tiny.pictures(3)
QUESTIONS = ["What is the colour of the small square?", "Is the cat on the left?", "How many red circles are there?"]
SETTINGS = {
    "paper": {},
    "budget": {"budget": 24, "merged_tokens": 4},
    "original": {"budget": 0.25, "coverage_share": 0.25, "text_relevance": "value", "position_ids": "original"},
    "off": {"enabled": False},
}
TEMPLATES = {
    "vicuna": tiny.VICUNA_TEMPLATE,
    # An end token behind an answer, the start token by the template, and answers otherwise than the model gave them.
    "spelled": "<s>{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}{{ part['text'] | upper }}</s>"
    "{% else %}{{ part['text'] }}\n{% endif %}{% endfor %}{% endfor %}assistant:",
}
REWRITES = "{{ messages | length }} " + tiny.VICUNA_TEMPLATE
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
each_mode = pytest.mark.parametrize("mode", ["rebuild", "append", "keep"])


class Listener(BaseStreamer):
    """The ids that a streamer is given."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


class Reader:
    """What goes through the language model, call by call."""

    def __init__(self, model):
        self.embeds, self.positions = [], []
        self.hook = model.model.language_model.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, module, args, kwargs):
        self.embeds.append(kwargs["inputs_embeds"][0])
        self.positions.append(kwargs["position_ids"].flatten().tolist())

    @property
    def read(self):
        return [len(positions) for positions in self.positions]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def start(architecture, mode, setting=None, template="vicuna", **arguments):
    processor = architecture.processor(chat_template=TEMPLATES.get(template, template))
    return Conversation(architecture.compressed(), processor, mode, setting, **arguments)


def ask(conversation, question, images=None, new_tokens=4, **options):
    """Ids of the whole conversation after a question."""
    listener = Listener()
    options = {"do_sample": False, "max_new_tokens": new_tokens, **options}
    conversation.ask(question, images, streamer=listener, **options)
    assert listener.ended
    return listener.ids


def messages_of(conversation, question, pictures):
    """The conversation as chat messages with its pictures; `pictures` per turn."""
    turns = [*((turn.question, turn.answer) for turn in conversation.turns), (question, None)]
    messages = []
    for (text, answer), images in zip(turns, pictures, strict=False):
        messages.append(tiny.turn("user", text, images))
        messages += [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return messages


def encode(conversation, question, pictures, **options):
    return conversation.processor.apply_chat_template(
        messages_of(conversation, question, pictures),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def single_call(model, inputs, new_tokens=4, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, **options)[0].tolist()


# Rebuild and keep: a call on the whole conversation


@each_architecture
@each_setting
@pytest.mark.parametrize(("template", "turns"), [("vicuna", "last"), ("spelled", "all")])
def test_rebuild_is_a_single_call_on_the_conversation(architecture, setting, template, turns):
    conversation = start(architecture, "rebuild", setting, template)
    conversation.processor.recovery_turns = turns
    pictures = [PICTURES[:1], [], PICTURES[1:3]]
    for question, images in zip(QUESTIONS, pictures, strict=True):
        inputs = encode(conversation, question, pictures)
        expected = single_call(conversation.model, inputs, token_recovery=setting)
        assert ask(conversation, question, images) == expected
    output = conversation.model(**inputs, token_recovery=setting)
    turn = conversation.turns[-1]
    assert turn.cache_length == turn.prefilled + 3
    assert len(turn.records) == 3
    if setting.get("enabled", True):
        assert turn.visual_tokens == int((output.visual_token_counts + output.newline_counts).sum())
        assert turn.prefilled == output.logits.shape[1]
    else:
        assert turn.prefilled == inputs["input_ids"].shape[1]


@each_architecture
@each_setting
@pytest.mark.parametrize("template", TEMPLATES)
def test_keep_is_a_single_call_with_the_first_question(architecture, setting, template):
    conversation = start(architecture, "keep", setting, template)
    pictures = [PICTURES[:2], [], []]
    for question, images in zip(QUESTIONS, pictures, strict=True):
        inputs = encode(conversation, question, pictures, recovery_text=QUESTIONS[0])
        with Reader(conversation.model) as alone:
            expected = single_call(conversation.model, inputs, token_recovery=setting)
        with Reader(conversation.model) as reader:
            assert ask(conversation, question, images) == expected
        assert reader.positions[0] == alone.positions[0][-reader.read[0] :]
        assert reader.positions[1:] == alone.positions[1:]
    first, *later = conversation.turns
    assert all(turn.records is not None and turn.visual_tokens == first.visual_tokens for turn in later)
    assert [turn.recovered for turn in later] == [0, 0]
    assert max(turn.prefilled for turn in later) < 60 < first.prefilled
    if not setting.get("enabled", True):
        names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        stock = architecture.shared_stock()
        assert single_call(stock, {name: inputs[name] for name in names if name in inputs}) == expected


# Append: a plain loop over what was put behind one another


def uncut(conversation, inputs):
    """The embedding of every token of the uncut sequence."""
    whole = {"budget": 1.0, "text_share": 0.0, "coverage_share": 0.0, "merged_tokens": 0}
    return conversation.model.compress_inputs(**inputs, token_recovery=whole)[0]["inputs_embeds"][0]


def greedy(architecture, embeds, positions):
    positions = torch.tensor([positions])
    ids = greedy_by_hand(architecture, embeds.unsqueeze(0), torch.ones_like(positions), positions, new_tokens=4)
    ids = ids[0].tolist()
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def chosen_places(architecture, inputs, setting):
    """Index in the uncut sequence of every patch and newline that a plain call keeps."""
    model = architecture.compressed()
    short, record = model.compress_inputs(**inputs, token_recovery={**setting, "position_ids": "original"})
    merged = int(record.counts.sum() - record.kept_mask.sum())
    image = short["input_ids"][0] == model.config.image_token_id
    places = short["position_ids"][0][image].tolist()
    return set(places[: len(places) - merged])  # of one picture


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("setting", [SETTINGS[name] for name in ("paper", "budget", "original")])
@pytest.mark.parametrize(("template", "turns"), [("vicuna", "last"), ("spelled", "all")])
def test_append_is_a_loop_over_what_joined(architecture, setting, template, turns):
    conversation, pictures = start(architecture, "append", setting, template), [PICTURES[:1], [], []]
    conversation.processor.recovery_turns = turns
    inputs = encode(conversation, QUESTIONS[0], pictures)
    short, _ = conversation.model.compress_inputs(**inputs, token_recovery={**setting, "position_ids": "original"})
    embeds, positions = short["inputs_embeds"][0], short["position_ids"][0].tolist()
    last, before = [], 0
    held = chosen_places(architecture, inputs, setting)
    joined_at_all = 0
    for number, question in enumerate(QUESTIONS):
        inputs = encode(conversation, question, pictures)
        ids, everything = inputs["input_ids"][0].tolist(), uncut(conversation, inputs)
        if number:
            # What the cache holds of the last answer stays where the template writes it as the model did.
            read = last[: len(last) - 1]
            same = next((at for at, pair in enumerate(zip(read, ids, strict=False)) if pair[0] != pair[1]), len(read))
            text = range(before, same)
            embeds = torch.cat([embeds, everything[list(text)]])
            positions += text
            joined = sorted(chosen_places(architecture, inputs, setting) - held)
            held |= {*joined}
            new = [*joined, *range(same, len(ids))]
            embeds = torch.cat([embeds, everything[new]])
            positions += new
            assert conversation.turns[-1].cache_length >= len(positions) - len(new)
            joined_at_all += len(joined)
        expected = greedy(architecture, embeds, positions)
        with Reader(conversation.model) as reader:
            last, before = ask(conversation, question, PICTURES[:1] if not number else None), len(ids)
        assert last == ids + expected
        width = len(new) if number else len(positions)
        assert conversation.turns[-1].prefilled == reader.read[0] == width
        assert reader.positions == [positions[-width:], *([len(ids) + step] for step in range(len(reader.read) - 1))]
        torch.testing.assert_close(reader.embeds[0], embeds[-width:])
        assert conversation.turns[-1].visual_tokens == conversation.turns[0].visual_tokens + joined_at_all
    assert joined_at_all > 0


@each_architecture
@pytest.mark.parametrize("mode", ["append", "keep"])
@each_setting
def test_nothing_in_the_cache_is_read_again(architecture, mode, setting):
    conversation = start(architecture, mode, setting)
    asked = [(QUESTIONS[0], PICTURES[:1]), (QUESTIONS[1], None), (QUESTIONS[2], PICTURES[1:])]
    asked += [(QUESTIONS[0], None), (QUESTIONS[2], None), (QUESTIONS[1], None)]
    with Reader(conversation.model) as counted:
        for question, images in asked:
            ask(conversation, question, images, new_tokens=1)  # the template cannot write half a token otherwise
            assert sum(counted.read) == conversation.turns[-1].cache_length
    turns = conversation.turns
    assert counted.read == [turn.prefilled for turn in turns]
    if mode == "append" and setting.get("enabled", True):
        assert turns[1].recovered + turns[3].recovered > 0  # the first question was not asked about the second picture
        assert turns[4].recovered == 0  # asked before about all
    elif not setting.get("enabled", True) or mode == "keep":
        assert [turn.recovered for turn in (turns[1], *turns[3:])] == [0] * 4


@each_architecture
def test_a_choice_that_the_question_does_not_change_joins_nothing(architecture):
    section = {"budget": 16, "text_encoder_config": None, "text_share": 0.0, "merged_tokens": 4}
    config = architecture.compressed().config.to_dict()
    model = architecture.model_class(architecture.config_class(**{**config, "token_recovery": section})).eval()
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    processor = architecture.processor(recovery_tokenizer=None)
    answers = []
    for mode in ("append", "keep"):
        conversation = Conversation(model, processor, mode, {"position_ids": "original"})
        answers.append([ask(conversation, QUESTIONS[0], PICTURES[:1]), ask(conversation, QUESTIONS[1])])
        assert conversation.turns[1].recovered == 0
        assert conversation.turns[1].records[0].text_similarity is None
    assert answers[0] == answers[1]


# Pictures that come later, and none


@each_architecture
def test_a_later_picture_stands_where_the_template_puts_it(architecture):
    """In `append` with its tokens and the earlier picture's at their own places of the uncut conversation."""
    setting = {"budget": 24, "merged_tokens": 0}
    conversation, pictures = start(architecture, "append", setting), [PICTURES[:1], PICTURES[1:2]]
    model, original = conversation.model, {**setting, "position_ids": "original"}
    before, _ = model.compress_inputs(**encode(conversation, QUESTIONS[0], pictures), token_recovery=original)
    ask(conversation, QUESTIONS[0], PICTURES[0], new_tokens=1)
    inputs = encode(conversation, QUESTIONS[1], pictures)
    short, _ = model.compress_inputs(**inputs, token_recovery=original)
    image, everything = model.config.image_token_id, uncut(conversation, inputs)
    chosen = short["position_ids"][0][short["input_ids"][0] == image].tolist()
    held = before["position_ids"][0].tolist()
    first = int((inputs["input_ids"][0] == image).nonzero()[0])
    end = first + conversation._lengths[0]
    joined = [place for place in chosen if place < end and place not in held]
    with Reader(model) as reader:
        ask(conversation, QUESTIONS[1], PICTURES[1], new_tokens=1)
    behind = [place for place in short["position_ids"][0].tolist() if place > max(held)]
    assert reader.positions[0] == [*joined, *behind]
    assert joined
    torch.testing.assert_close(reader.embeds[0], everything[reader.positions[0]])


@each_architecture
@each_mode
def test_pictures_may_come_later(architecture, mode):
    conversation = start(architecture, mode, {"budget": 24, "merged_tokens": 4}, system="Be brief.")
    for question, images in ((QUESTIONS[0], None), (QUESTIONS[1], PICTURES[0]), (QUESTIONS[2], PICTURES[1:])):
        ids = ask(conversation, question, images)
    turns = conversation.turns
    assert [len(turn.records) for turn in turns] == [0, 1, 3]
    assert turns[0].visual_tokens == turns[0].recovered == 0
    assert turns[1].recovered == 20
    assert turns[2].recovered >= 40
    inputs = encode(conversation, "", [[], PICTURES[:1], PICTURES[1:]], recovery_text="none")
    image = conversation.model.config.image_token_id
    assert ids.count(image) == int((inputs["input_ids"] == image).sum())
    assert len(conversation.plot(0).axes) >= 1 + 2
    titles = [axis.get_title(loc) for axis in conversation.plot(1).axes for loc in ("left", "center")]
    assert QUESTIONS[2] in " ".join(titles).replace("\n", " ")
    assert QUESTIONS[1] not in " ".join(titles)
    with pytest.raises(ValueError, match="picture must be below the 3 images so far, got 3"):
        conversation.plot(3)


@each_architecture
@each_mode
def test_the_vision_tower_sees_a_picture_once(architecture, mode):
    conversation, runs = start(architecture, mode), []
    tower = conversation.model.model.vision_tower
    embeddings = next(module for name, module in tower.named_modules() if name.endswith("patch_embedding"))
    hook = embeddings.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    try:
        for question, images in zip(QUESTIONS, (PICTURES[0], PICTURES[1], None), strict=True):
            ask(conversation, question, images)
    finally:
        hook.remove()
    assert len(runs) == 2


@each_architecture
@each_mode
@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_system_prompt_is_no_part_of_the_question(architecture, mode, turns):
    """With it the scores that choose are those without it, and it is read."""
    plain, told = (start(architecture, mode, {"budget": 24}, system=system) for system in (None, QUESTIONS[2]))
    for conversation in (plain, told):
        conversation.processor.recovery_turns = turns
        for number, question in enumerate(QUESTIONS[:2]):
            ask(conversation, question, None if number else PICTURES[0], new_tokens=1)
    for turn, other in zip(plain.turns, told.turns, strict=True):
        assert torch.equal(turn.records[0].text_similarity, other.records[0].text_similarity)
        assert torch.equal(turn.records[0].kept_mask, other.records[0].kept_mask)
    assert told.turns[0].prefilled > plain.turns[0].prefilled
    asked = told.turns[0].records[0].text_similarity
    ask(told, QUESTIONS[2], new_tokens=1)
    assert not torch.equal(told.turns[2].records[0].text_similarity, asked) or mode == "keep"


# The cap


@each_architecture
@each_setting
def test_never_more_than_the_cap(architecture, setting):
    setting = {**setting, "position_ids": "original"} if setting.get("enabled", True) else setting
    free, asked = start(architecture, "append", setting), [*QUESTIONS, QUESTIONS[0]]
    for number, question in enumerate(asked):
        ask(free, question, PICTURES[0] if not number else None)
    first, most = free.turns[0].visual_tokens, free.turns[-1].visual_tokens
    tight = start(architecture, "append", setting, max_visual_tokens=first)
    wide = start(architecture, "append", setting, max_visual_tokens=most)
    for number, question in enumerate(asked):
        images = PICTURES[0] if not number else None
        try:
            ask(tight, question, images, new_tokens=1)
        except ValueError as error:  # a dynamic choice may need more than the first one
            assert setting == SETTINGS["paper"] | {"position_ids": "original"}
            assert "the choice for this question has" in str(error)
            tight.max_visual_tokens += 60
            ask(tight, question, images, new_tokens=1)
        assert tight.turns[-1].visual_tokens <= tight.max_visual_tokens
        ask(wide, question, images)
        assert wide.turns[number].answer == free.turns[number].answer
    assert most > first or not setting.get("enabled", True)


@each_architecture
def test_what_was_not_chosen_for_the_longest_time_leaves_first(architecture):
    setting = {"budget": 24, "merged_tokens": 4, "text_share": 1.0}
    conversation = start(architecture, "append", setting, max_visual_tokens=100)
    ask(conversation, QUESTIONS[0], PICTURES[0], new_tokens=1)
    held = conversation._cache
    first = [dataclasses.replace(token) for token in held.visual]
    keys = held.key_values.layers[0].keys.clone()
    free = start(architecture, "append", setting)
    ask(free, QUESTIONS[0], PICTURES[0], new_tokens=1)
    ask(free, QUESTIONS[1], new_tokens=1)
    conversation.max_visual_tokens = cap = (len(first) + free.turns[1].visual_tokens) // 2
    ask(conversation, QUESTIONS[1], new_tokens=1)
    now = {(token.image, token.place): token for token in held.visual if token.kind != "merged"}
    joined = [token for token in now.values() if token.turn == 1 and token.entry >= keys.shape[-2] - 24]
    assert len(held.visual) <= cap
    assert joined
    gone = [token for token in first if token.kind == "patch" and (token.image, token.place) not in now]
    stayed = [token for token in first if token.kind == "patch" and (token.image, token.place) in now]
    assert gone
    assert sum(token.kind == "merged" for token in held.visual) == 4
    # What the second question chose too stays; of the rest, what stood first in the cache went.
    unused = [token for token in stayed if now[token.image, token.place].turn == 0]
    assert max((token.entry for token in gone), default=-1) < min((token.entry for token in unused), default=10**6)
    # What stays in the cache is untouched.
    for token in stayed:
        entry = now[token.image, token.place].entry
        assert torch.equal(held.key_values.layers[0].keys[..., entry, :], keys[..., token.entry, :])


def test_newlines_leave_with_their_rows():
    architecture = LLAVA_NEXT
    conversation = start(architecture, "append", {"budget": 12, "merged_tokens": 0, "text_share": 1.0})
    for number, question in enumerate([*QUESTIONS, *QUESTIONS]):
        if number:
            conversation.max_visual_tokens = conversation.turns[0].visual_tokens + 8
        ask(conversation, question, PICTURES[0] if not number else None, new_tokens=1)
        rows = {(token.image, token.row) for token in conversation._cache.visual if token.kind == "patch"}
        newlines = {(token.image, token.row) for token in conversation._cache.visual if token.kind == "newline"}
        assert newlines
        assert newlines <= rows
        # Every row but the base tile's, which has none, ends in one.
        assert {row for _, row in rows - newlines} <= {0}


# Streaming, refusals, failures


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


def test_a_cap_below_one_choice():
    conversation = start(LLAVA, "append", {"budget": 24}, max_visual_tokens=23)
    with pytest.raises(
        ValueError, match=r"max_visual_tokens is 23, but the choice for this question has 24 .*at least 24"
    ):
        ask(conversation, QUESTIONS[0], PICTURES[0])
    conversation.max_visual_tokens = 24
    ask(conversation, QUESTIONS[0], PICTURES[0])
    assert conversation.turns[0].visual_tokens == 24
