"""`max_visual_tokens`: which tokens leave the cache of a conversation, and when."""

import dataclasses

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from conversations import PICTURES, QUESTIONS, SETTINGS, ask, each_setting, start


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
    cache = conversation._cache
    first = [dataclasses.replace(token) for token in cache.visual]
    keys = cache.key_values.layers[0].keys.clone()
    free = start(architecture, "append", setting)
    ask(free, QUESTIONS[0], PICTURES[0], new_tokens=1)
    ask(free, QUESTIONS[1], new_tokens=1)
    conversation.max_visual_tokens = cap = (len(first) + free.turns[1].visual_tokens) // 2
    ask(conversation, QUESTIONS[1], new_tokens=1)
    now = {(token.image, token.place): token for token in cache.visual if token.kind != "merged"}
    joined = [token for token in now.values() if token.turn == 1 and token.entry >= keys.shape[-2] - 24]
    assert len(cache.visual) <= cap
    assert joined
    gone = [token for token in first if token.kind == "patch" and (token.image, token.place) not in now]
    stayed = [token for token in first if token.kind == "patch" and (token.image, token.place) in now]
    assert gone
    assert sum(token.kind == "merged" for token in cache.visual) == 4
    # What the second question chose too stays; of the rest, what stood first in the cache went.
    unused = [token for token in stayed if now[token.image, token.place].turn == 0]
    assert max((token.entry for token in gone), default=-1) < min((token.entry for token in unused), default=10**6)
    # What stays in the cache is untouched.
    for token in stayed:
        entry = now[token.image, token.place].entry
        assert torch.equal(cache.key_values.layers[0].keys[..., entry, :], keys[..., token.entry, :])


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


def test_a_cap_below_one_choice():
    conversation = start(LLAVA, "append", {"budget": 24}, max_visual_tokens=23)
    with pytest.raises(
        ValueError, match=r"max_visual_tokens is 23, but the choice for this question has 24 .*at least 24"
    ):
        ask(conversation, QUESTIONS[0], PICTURES[0])
    conversation.max_visual_tokens = 24
    ask(conversation, QUESTIONS[0], PICTURES[0])
    assert conversation.turns[0].visual_tokens == 24
