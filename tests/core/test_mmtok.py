"""MMTok from the prompt to the tokens: the question's words, their tokens, and what the model makes of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tiny
import torch
from architectures import LLAVA, ROWS, assert_clear_choices, call, each_architecture, generate, single_runs
from oracle_methods import OPTIONS, method_oracles
from tape import TapeRecorder
from torch.nn.functional import normalize

from reccomp_hf import RecoveryMethod, TokenRecoveryConfig
from reccomp_hf.core.graphs import GraphCache
from reccomp_hf.core.questions import ANSWER_INSTRUCTIONS
from reccomp_hf.core.words import NO_WORD, STOP_WORDS, content_words, encode_words

SECTION = {"method": "mmtok", "budget": 7}


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What letter is on the cyan sign?", ["letter", "on", "cyan", "sign"]),
        ("HOW many Red circles?", ["many", "Red", "circles"]),
        ("Is it the man's hat, or a T-shirt?", ["man", "s", "hat", "T", "shirt"]),
        ("What is it?", ["What", "is", "it?"]),  # nothing but stop words: the text itself
        (f"Is there a cat?\n{ANSWER_INSTRUCTIONS[0]}", ["there", "cat"]),
        (f"{ANSWER_INSTRUCTIONS[1]} Which of them? {ANSWER_INSTRUCTIONS[0]}", ["of", "them"]),
        (f"Who? {ANSWER_INSTRUCTIONS[0]}", ["Who?"]),
        (ANSWER_INSTRUCTIONS[0], []),
        ("质量 是什么?", ["质量", "是什么"]),
        ("", []),
    ],
)
def test_words_of_a_question(question, words):
    assert content_words(question) == words


def test_the_stop_words_are_those_of_the_published_code():
    assert len(STOP_WORDS) == 47
    assert {"onto", "question", "answer", "why"} < STOP_WORDS
    assert not {"on", "in", "of", "not", "there", "this", "that", "can"} & STOP_WORDS


def test_words_are_encoded_as_a_list_of_words_is():
    tokenizer, texts = tiny.llm_tokenizer(), [*tiny.SENTENCES[:3], "Who?", ""]
    table = encode_words(tokenizer, texts)
    assert table.dtype == np.int64 and table.shape[1] % 32 == 0
    for row, text in zip(table, texts, strict=True):
        words = content_words(text)
        options = {"is_split_into_words": True, "add_special_tokens": False}
        expected = tokenizer(words, **options).input_ids if words else []
        assert row[: len(expected)].tolist() == expected
        assert (row[len(expected) :] == NO_WORD).all()
        alone = encode_words(tokenizer, [text])[0]
        assert alone[alone != NO_WORD].tolist() == expected


def test_the_words_of_several_questions_follow_each_other():
    tokenizer = tiny.llm_tokenizer()
    (both,), (first,), (second,) = (encode_words(tokenizer, [row]) for row in (["cat", "dog"], "cat", "dog"))
    kept = [row[row != NO_WORD].tolist() for row in (both, first, second)]
    assert kept[0] == kept[1] + kept[2]
    assert encode_words(tokenizer, []).shape == (0, 32)


@each_architecture
def test_a_row_has_the_words_that_it_has_alone(architecture):
    """However the question reaches the processor: in a prompt, a chat or by itself."""
    batch = architecture.encode(ROWS)["recovery_words"]
    for row, (single, (question, _)) in enumerate(zip(single_runs(architecture), ROWS, strict=True)):
        words = batch[row][batch[row] != NO_WORD]
        for other in (
            single["recovery_words"][0],
            architecture.processor().encode_questions([question])["recovery_words"][0],
            torch.from_numpy(encode_words(architecture.processor().tokenizer, [question])[0]),
        ):
            assert other[other != NO_WORD].equal(words)


# ---- the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def oracle_records(model, batch, section):
    """The plain loop on features that stock modules compute: embeddings of words, projected patches."""
    encoded = model.encode_images(batch["pixel_values"], batch.get("image_sizes"), token_recovery=section)
    blocks = model.config.vision_config.num_hidden_layers
    states = encoded.states[model.config.vision_feature_layer % (blocks + 1)][:, 1:]
    patches = normalize(model.model.multi_modal_projector(states).double(), dim=-1)
    images = (batch["input_ids"] == model.config.image_token_id).sum(-1)
    rows = []
    for row, length in enumerate(images.tolist()):
        while length > 0:
            length -= encoded.layout.lengths[len(rows)]
            rows.append(row)
    tiles = [row for row, size in zip(rows, encoded.layout.tiles, strict=True) for _ in range(size)]
    words = batch["recovery_words"][tiles]
    embeds = normalize(model.get_input_embeddings().weight[words.clamp(min=0)].double(), dim=-1)
    cosines = (embeds @ patches.transpose(1, 2)).masked_fill((words == NO_WORD).unsqueeze(-1), -torch.inf)
    valid = encoded.layout.valid
    h, keys = states.double().numpy(), np.zeros((len(states), states.shape[1] + 1, states.shape[2]))
    config = TokenRecoveryConfig(**section, method_options=OPTIONS["mmtok"])
    return encoded.layout.tiles, method_oracles(
        h,
        keys,
        np.zeros(h.shape[:2]),
        None,
        config,
        valid=None if valid is None else valid.numpy(),
        tiles=encoded.layout.tiles,
        words=cosines.numpy(),
    )


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 7, 14, 0.3])
@each_architecture
def test_the_model_chooses_what_the_plain_loop_chooses(architecture, budget):
    model, batch, section = architecture.compressed(), architecture.encode(ROWS), {"method": "mmtok", "budget": budget}
    records, (tiles, rows) = model.recover(**batch, token_recovery=section), oracle_records(model, batch, section)
    found = [record.places[tile].tolist() for record in records for tile in range(len(record.places))]
    assert len(found) == len(rows) == sum(tiles)
    for places, row in zip(found, rows, strict=True):
        assert row["gap"] > 1e-5
        assert places == row["places"] + [-1] * (len(places) - row["counts"])
    assert all(record.text_similarity is None for record in records)


@torch.no_grad()
def test_the_question_changes_the_choice():
    model, batch = LLAVA.compressed(), LLAVA.encode(ROWS)
    (one, *_), (other, *_) = (
        model.recover(**{**batch, "recovery_words": words}, token_recovery=SECTION)
        for words in (batch["recovery_words"], batch["recovery_words"].roll(1, 0))
    )
    assert one.places.tolist() != other.places.tolist()
    # The text encoder's question is not read.
    unread = {**batch, "recovery_input_ids": batch["recovery_input_ids"].flip(0)}
    (again, *_) = model.recover(**unread, token_recovery=SECTION)
    assert again.places.equal(one.places)
    del unread["recovery_input_ids"], unread["recovery_attention_mask"]
    (again, *_) = model.recover(**unread, token_recovery=SECTION)
    assert again.places.equal(one.places)


@torch.no_grad()
@each_architecture
def test_rules_may_mix_it_with_methods_that_read_the_text_encoder(architecture):
    model = architecture.compressed()
    rules = [{"begins": "how many", "method": "cdpruner", "budget": 9}, {"begins": "what", "budget": 5}]
    section = {**SECTION, "rules": rules}
    batch = dict(architecture.processor()(**call(ROWS), recovery_rules=rules, return_tensors="pt", padding=True))
    assert batch["recovery_rule"].tolist() == [1, 0, -1, 1]
    records, begin = model.recover(**batch, token_recovery=section), 0
    what = {**SECTION, "budget": 5}
    alone = (what, {"method": "cdpruner", "budget": 9}, SECTION, what)
    for row, settings in enumerate(alone):
        images = ROWS[row][1]
        if not images:
            continue
        single = architecture.encode([ROWS[row]], first=begin)
        for record, wanted in zip(
            records[begin : begin + images], model.recover(**single, token_recovery=settings), strict=True
        ):
            assert record.places.equal(wanted.places)
        begin += images
    assert generate(model, batch, token_recovery=section).shape[0] == len(ROWS)


@torch.no_grad()
def test_choices_are_clear():
    for section in (SECTION, {"method": "mmtok", "budget": 14}):
        assert_clear_choices(LLAVA.compressed(), LLAVA.encode(ROWS), section)


@torch.no_grad()
def test_recordings_see_the_embeddings_and_give_the_same_answers():
    model, batch = LLAVA.build(**SECTION), LLAVA.encode(ROWS[:2])
    wanted, recorder = generate(model, batch), TapeRecorder()
    model._graphs = GraphCache(recorder=recorder)
    for _ in range(2):
        assert generate(model, batch).equal(wanted)
    assert not any("front" in refusal for refusal in model._graphs.refusals)
    other = LLAVA.encode([ROWS[1], ROWS[0]][::-1], first=2)
    model._graphs = None
    fresh = model.recover(**other)
    model._graphs = GraphCache(recorder=TapeRecorder())
    model(**batch)
    places = model.compress_inputs(**other)[1].places
    assert places.equal(torch.cat([record.places for record in fresh]))
    model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))
    moved = model.compress_inputs(**other)[1].places
    assert not moved.equal(places)


@torch.no_grad()
def test_the_front_compiles_and_exports(monkeypatch):
    model, batch = LLAVA.build(**SECTION), LLAVA.encode(ROWS)
    given, run = [], model._run_front
    monkeypatch.setattr(model, "_run_front", lambda *front: given.append(front) or run(*front))
    places = model.compress_inputs(**batch)[1].places
    ((inputs, plan),) = given

    class Front(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return self.model._front(inputs, plan).tensors()

    assert "question" not in inputs and inputs["words"].equal(batch["recovery_words"])
    exported = torch.export.export(Front(), (inputs,), strict=False)
    assert exported.module()(inputs)["record places"].equal(places)
    torch._dynamo.reset()
    compiled = torch.compile(Front().forward, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        assert compiled(inputs)["record places"].equal(places)


# ---- errors --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda words: None, "needs the question's words: recovery_words is None.*processor"),
        (lambda words: words[:2], r"recovery_words must have shape \(rows, tokens\) with 4 rows, got \(2, "),
        (lambda words: words.float(), "recovery_words must be an integer tensor of 2 dimensions"),
        (lambda words: words.clamp(max=-1), "Row 0 has an image but no question"),
        (lambda words: words.clamp(min=100_000), "recovery_words must be ids from 0 to"),
    ],
    ids=["none", "rows", "float", "empty", "unknown"],
)
def test_words_that_do_not_fit_are_refused(change, match):
    batch = dict(LLAVA.encode(ROWS))
    batch["recovery_words"] = change(batch["recovery_words"])
    with pytest.raises(ValueError, match=match):
        LLAVA.compressed().recover(**batch, token_recovery=SECTION)


def test_words_need_a_question_and_projected_patches():
    for wrong in ({"text": "optional", "reads_projected": True}, {"text": "required"}):
        with pytest.raises(ValueError, match="reads_words needs text='required' and reads_projected=True, got"):
            RecoveryMethod(lambda features, settings: features.keep(), reads_words=True, **wrong)
