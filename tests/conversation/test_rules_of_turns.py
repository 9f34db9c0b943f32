"""A section with rules in a conversation: the question of a turn decides which settings hold."""

import pytest
from architectures import LLAVA, each_architecture
from conversations import PICTURES, ask, each_mode, encode, single_call

from reccomp_hf import Conversation

RULES = [{"begins": "how many", "budget": 9}, {"begins": "is the", "budget": 14, "method": "trim"}]
FIELDS = {"budget": 20, "merged_tokens": 0, "rules": RULES}
QUESTIONS = ["How many red circles are there?", "What is the colour of the small square?", "Is the cat on the left?"]
COUNTS = [9, 20, 14]


def start(architecture, mode, fields):
    return Conversation(architecture.compressed(), architecture.processor(), mode, fields)


@each_architecture
def test_each_turn_is_a_call_with_its_own_rule(architecture):
    conversation = start(architecture, "rebuild", FIELDS)
    for question in QUESTIONS:
        pictures = [[PICTURES[0]]] + [[]] * len(conversation.turns)
        inputs = encode(conversation, question, pictures, recovery_rules=RULES)
        expected = single_call(conversation.model, inputs, token_recovery=FIELDS)
        assert ask(conversation, question, None if conversation.turns else PICTURES[0]) == expected
    for turn, count in zip(conversation.turns, COUNTS, strict=True):
        assert turn.visual_tokens - newlines(turn, architecture) == count


def newlines(turn, architecture):
    return (
        0 if architecture is LLAVA else turn.visual_tokens - sum(int(record.counts.sum()) for record in turn.records)
    )


def test_append_adds_what_the_turns_rule_chooses():
    conversation = start(LLAVA, "append", {**FIELDS, "rules": [RULES[0], {"begins": "is the", "budget": 14}]})
    for question in QUESTIONS:
        ask(conversation, question, None if conversation.turns else PICTURES[0])
    chosen = [turn.records[0] for turn in conversation.turns]
    assert [int(record.counts) for record in chosen] == COUNTS
    kept = chosen[0].kept_mask
    for turn, record in zip(conversation.turns, chosen, strict=True):
        kept = kept | record.kept_mask
        assert turn.visual_tokens == int(kept.sum())


def test_keep_chooses_by_the_first_questions_rule():
    conversation = start(LLAVA, "keep", FIELDS)
    for question in QUESTIONS:
        ask(conversation, question, None if conversation.turns else PICTURES[0])
    assert [turn.visual_tokens for turn in conversation.turns] == [COUNTS[0]] * 3


@each_mode
def test_the_checkpoints_rules_hold_unless_a_field_is_overridden(mode):
    model = LLAVA.build(budget=20, merged_tokens=0, rules=[RULES[0]])
    for fields, count in ((None, 9), ({"budget": 5}, 5), ({"enabled": False}, 100), ({"rules": []}, 20)):
        conversation = Conversation(model, LLAVA.processor(), mode, fields)
        ask(conversation, QUESTIONS[0], PICTURES[0])
        assert conversation.turns[0].visual_tokens == count


def test_a_rules_method_without_places_cannot_append():
    rules = [{"begins": "how", "method": "authors", "budget": None}]
    with pytest.raises(ValueError, match="tokens of method 'authors' have none"):
        start(LLAVA, "append", {"rules": rules})
