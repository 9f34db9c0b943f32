"""The modes of a conversation: what each reads, keeps and answers, compared with plain calls of the model."""

import pytest
import torch
from architectures import each_architecture, greedy_by_hand
from conversations import (
    PICTURES,
    QUESTIONS,
    SETTINGS,
    TEMPLATES,
    Reader,
    ask,
    each_mode,
    each_setting,
    encode,
    single_call,
    start,
)

from reccomp_hf import Conversation

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


# Append: a plain loop over the tokens in the order in which they were added


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
def test_append_equals_a_loop_over_the_added_tokens(architecture, setting, template, turns):
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
def test_a_system_prompt_is_not_part_of_the_question(architecture, mode, turns):
    """The similarity scores are the same with and without it, but the language model reads it."""
    plain, prompted = (start(architecture, mode, {"budget": 24}, system=system) for system in (None, QUESTIONS[2]))
    for conversation in (plain, prompted):
        conversation.processor.recovery_turns = turns
        for number, question in enumerate(QUESTIONS[:2]):
            ask(conversation, question, None if number else PICTURES[0], new_tokens=1)
    for turn, other in zip(plain.turns, prompted.turns, strict=True):
        assert torch.equal(turn.records[0].text_similarity, other.records[0].text_similarity)
        assert torch.equal(turn.records[0].kept_mask, other.records[0].kept_mask)
    assert prompted.turns[0].prefilled > plain.turns[0].prefilled
    similarity = prompted.turns[0].records[0].text_similarity
    ask(prompted, QUESTIONS[2], new_tokens=1)
    assert not torch.equal(prompted.turns[2].records[0].text_similarity, similarity) or mode == "keep"
