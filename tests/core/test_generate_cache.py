"""`generate` behind a cache that is not empty: new ids alone, or the whole sequence as the stock method takes it."""

import pytest
import tiny
import torch
from architectures import CACHE, ROWS, each_architecture, generate, greedy_by_hand
from transformers import DynamicCache, LogitsProcessorList, TextStreamer

from reccomp_hf.core.splicing import counted_positions

QUESTIONS = [[9, 20, 31, 42, 53], [10, 11, 12, 13, 14], [60, 61, 62, 63, 64], [15, 25, 35, 45, 55]]
POSITIONS = ["compact", "original"]
ENDLESS = {"eos_token_id": 10**6}


def first_turn(architecture, positions="compact", rows=ROWS):
    """A cache after a first answer, and everything that it holds: embeddings, mask, positions."""
    model, batch = architecture.compressed(), architecture.encode(rows)
    setting = {"position_ids": positions}
    counted = counted_positions(batch["attention_mask"])
    short, _ = model.compress_inputs(**batch, position_ids=counted, token_recovery=setting)
    cache = DynamicCache()
    ids = generate(model, short, new_tokens=3, min_new_tokens=3, **{CACHE: cache}, token_recovery=setting)
    answer = ids[:, short["input_ids"].shape[1] :]
    held = {
        "embeds": torch.cat([short["inputs_embeds"], model.get_input_embeddings()(answer)], dim=1),
        "mask": torch.cat([short["attention_mask"], torch.ones_like(answer)], dim=1),
        "positions": torch.cat(
            [short["position_ids"], short["position_ids"][:, -1:] + torch.tensor([1, 2, 3])], dim=1
        ),
    }
    assert cache.get_seq_length() == held["mask"].shape[1] - 1
    return cache, answer[:, -1:], held


def second_turn(held, last, rows=ROWS):
    """New ids that begin with the one that was not read, their mask and their positions."""
    new = torch.cat([last, torch.tensor(QUESTIONS[: len(rows)])], dim=1)
    past = held["mask"].shape[1] - 1
    mask = torch.cat([held["mask"][:, :past], torch.ones_like(new)], dim=1)
    positions = held["positions"][:, -1:] + torch.arange(new.shape[1])
    return {"input_ids": new, "attention_mask": mask, "position_ids": positions}


def from_scratch(architecture, held, new):
    """Greedy ids of the stock language model over everything, without a cache."""
    read = architecture.shared_stock().get_input_embeddings()(new["input_ids"])
    embeds = torch.cat([held["embeds"][:, :-1], read], dim=1)
    positions = torch.cat([held["positions"][:, :-1], new["position_ids"]], dim=1)
    return greedy_by_hand(architecture, embeds, new["attention_mask"], positions)


@each_architecture
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_new_ids_alone_continue(architecture, positions, embedded):
    cache, last, held = first_turn(architecture, positions)
    new = second_turn(held, last)
    expected = from_scratch(architecture, held, new)
    inputs = dict(new)
    if positions == "compact":
        del inputs["position_ids"]  # they follow from the mask
    if embedded:
        inputs["inputs_embeds"] = architecture.compressed().get_input_embeddings()(new["input_ids"])
        inputs["input_ids"] = torch.full_like(new["input_ids"], 7)  # not read
    setting = {"position_ids": positions}
    options = {CACHE: cache, "token_recovery": setting, **ENDLESS}
    ids = generate(architecture.compressed(), inputs, **options)
    assert torch.equal(ids, torch.cat([inputs["input_ids"], expected], dim=1))
    assert cache.get_seq_length() == new["attention_mask"].shape[1] + 5


@each_architecture
def test_one_embedding_is_read_once(architecture):
    cache, last, held = first_turn(architecture)
    new = {name: value[:, : value.shape[1] - 5] for name, value in second_turn(held, last).items()}
    expected = from_scratch(architecture, held, new)
    embeds = architecture.compressed().get_input_embeddings()(new["input_ids"])
    options = {CACHE: cache, **ENDLESS}
    assert torch.equal(
        generate(architecture.compressed(), {**new, "inputs_embeds": embeds}, **options)[:, 1:], expected
    )


@each_architecture
def test_lengths_streams_and_processors_know_the_new_ids_alone(architecture, capsys):
    rows, model, seen = ROWS[:1], architecture.compressed(), []
    tokenizer = architecture.processor().tokenizer
    cache, last, held = first_turn(architecture, rows=rows)
    new = second_turn(held, last, rows)
    options = {"max_length": 6 + 4, "max_new_tokens": None, "streamer": TextStreamer(tokenizer), **ENDLESS}
    watch = LogitsProcessorList([lambda ids, scores: seen.append(ids) or scores])
    ids = generate(model, new, **{CACHE: cache}, logits_processor=watch, **options)
    assert capsys.readouterr().out == tokenizer.decode(ids[0]) + "\n"
    assert [shown.shape[1] for shown in seen] == [6, 7, 8, 9]
    assert torch.equal(seen[-1], ids[:, :9])
    assert ids.shape[1] == 10


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_whole_sequences_of_text_are_stock(architecture, enabled, masked):
    ids = torch.tensor([[1, *range(20, 40)]])
    inputs = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    outputs = []
    for model in (architecture.shared_stock(), architecture.compressed()):
        cache = DynamicCache()
        model(input_ids=ids[:, :9], **{CACHE: cache}, use_cache=True)
        options = {} if model is architecture.shared_stock() else {"token_recovery": {"enabled": enabled}}
        outputs.append(generate(model, inputs, **{CACHE: cache}, **options))
    assert torch.equal(*outputs)


@each_architecture
def test_inputs_that_do_not_fit_a_cache_are_refused(architecture):
    model, rows = architecture.compressed(), ROWS[:1]
    cache, last, held = first_turn(architecture, rows=rows)
    new, past = second_turn(held, last, rows), cache.get_seq_length()
    ids, mask = new["input_ids"], new["attention_mask"]

    def refused(match, **inputs):
        with pytest.raises(ValueError, match=match):
            model.generate(**inputs, **{CACHE: cache}, max_new_tokens=2)
        assert cache.get_seq_length() == past

    how = rf"new ids alone with attention_mask of shape \(rows, {past} \+ new ids\)"
    refused(rf"input_ids hold 6 ids and {CACHE} already {past}.*{how}", input_ids=ids)
    refused(f"already {past}", input_ids=ids, attention_mask=mask[:, -6:])
    refused(
        rf"attention_mask covers {past + 5} tokens, but {CACHE} holds {past} and input_ids 6 more: "
        rf"give it the shape \(rows, {past + 6}\)",
        input_ids=ids,
        attention_mask=mask[:, 1:],
    )
    placeholder = ids.clone()
    placeholder[0, 2] = model.config.image_token_id
    refused("without their images.*reccomp_hf.Conversation", input_ids=placeholder, attention_mask=mask)
    batch = architecture.encode(rows)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    refused(f"hold image placeholders, but {CACHE} is not empty.*{how}", **prompt)
    original = {"position_ids": "original"}
    refused(
        r"'original' the cache does not say.*pass position_ids \(rows, 6\)",
        input_ids=ids,
        attention_mask=mask,
        token_recovery=original,
    )
    for name, value in {"prompt_lookup_num_tokens": 3, "assistant_model": architecture.shared_stock()}.items():
        refused(f"{name} reads the whole prompt", input_ids=ids, attention_mask=mask, **{name: value})


@each_architecture
def test_a_second_image_continues_from_compress_inputs(architecture):
    """As `Conversation` does it: a second image's tokens and text follow the cache of the first."""
    model, rows = architecture.compressed(), ROWS[:1]
    cache, _, held = first_turn(architecture, rows=rows)
    batch = architecture.encode([(tiny.SENTENCES[1], 1)], first=3)
    short, _ = model.compress_inputs(**batch)
    mask = torch.cat([held["mask"][:, :-1], short["attention_mask"]], dim=1)
    positions = cache.get_seq_length() + torch.arange(short["input_ids"].shape[1]).unsqueeze(0)
    new = {"input_ids": short["input_ids"], "attention_mask": mask, "position_ids": positions}
    embeds = torch.cat([held["embeds"][:, :-1], short["inputs_embeds"]], dim=1)
    expected = greedy_by_hand(architecture, embeds, mask, counted_positions(mask), new_tokens=4)
    options = {CACHE: cache, "new_tokens": 4, **ENDLESS}
    output = generate(model, {**new, "inputs_embeds": short["inputs_embeds"]}, **options)
    assert torch.equal(output[:, short["input_ids"].shape[1] :], expected)
