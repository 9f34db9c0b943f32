"""Promises of every compressed model about `generate`: stock generation on a short prompt that looks long."""

import pytest
import tiny
import torch
from architectures import MODEL_SETTINGS, ROWS, each_architecture, each_setting, generate, greedy_by_hand, single_runs
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, set_seed

from reccomp_hf.core.splicing import counted_positions

OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam sequences": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "repetition": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "min new": {"min_new_tokens": 6},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def new_ids(model, batch, **kwargs):
    return generate(model, batch, **kwargs)[:, batch["input_ids"].shape[1] :]


def compressed(model, batch, setting):
    """`compress_inputs` with the positions that `generate` counts."""
    positions = counted_positions(batch["attention_mask"])
    return model.compress_inputs(**batch, position_ids=positions, token_recovery=setting)[0]


@each_architecture
@each_option
def test_generate_is_stock_generate_on_the_short_prompt(architecture, options):
    model, batch = architecture.compressed(), architecture.encode()
    ids, copies = batch["input_ids"], options.get("num_return_sequences", 1)
    set_seed(1)
    ours = generate(model, batch, **options)
    assert ours.shape[0] == len(ids) * copies
    assert torch.equal(ours[:, : ids.shape[1]], ids.repeat_interleave(copies, dim=0))
    short, _ = model.compress_inputs(**batch)
    for other in (architecture.shared_stock(), model):
        set_seed(1)
        theirs = generate(other, short, **options)
        assert torch.equal(theirs[:, short["input_ids"].shape[1] :], ours[:, ids.shape[1] :])


@each_architecture
@each_setting
def test_greedy_is_a_loop_over_the_stock_language_model(architecture, setting):
    model, batch = architecture.compressed(), architecture.encode()
    ids = new_ids(model, batch, token_recovery=setting)
    short = compressed(model, batch, setting)
    mask, positions = short["attention_mask"], short.get("position_ids")
    positions = counted_positions(mask) if positions is None else positions
    by_hand = greedy_by_hand(architecture, short["inputs_embeds"], mask, positions)
    ended = ((by_hand == model.generation_config.eos_token_id).cumsum(-1) > 0).roll(1, 1)
    ended[:, 0] = False
    assert torch.equal(ids, by_hand.masked_fill(ended, model.generation_config.pad_token_id)[:, : ids.shape[1]])


@each_architecture
@each_setting
def test_a_row_of_a_batch_generates_as_alone(architecture, setting):
    model, batch = architecture.compressed(), architecture.encode()
    ids = new_ids(model, batch, token_recovery=setting)
    for row, single in zip(ids, single_runs(architecture), strict=True):
        alone = new_ids(model, single, token_recovery=setting)[0]
        assert torch.equal(row[: len(alone)], alone)


@each_architecture
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_the_cache_changes_nothing(architecture, positions):
    model, batch = architecture.compressed(), architecture.encode()
    setting = {"position_ids": positions}
    cached = new_ids(model, batch, token_recovery=setting)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(new_ids(model, batch, token_recovery=setting, **options), cached)


@each_architecture
def test_original_positions_continue_behind_the_uncut_prompt(architecture):
    model, batch, seen = architecture.compressed(), architecture.encode(), []
    setting = {"position_ids": "original"}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    try:
        generate(model, batch, token_recovery=setting, min_new_tokens=6)
    finally:
        hook.remove()
    expected = compressed(model, batch, setting)["position_ids"]
    last = batch["attention_mask"].sum(-1, keepdim=True) - 1
    assert torch.equal(expected[:, -1:], last)
    for step, positions in enumerate(seen):
        expected = torch.cat([expected, last + step], dim=1) if step else expected
        assert torch.equal(positions, expected[:, -positions.shape[1] :])
    assert len(seen) == 6


@each_architecture
def test_prompt_lookup_is_stock_prompt_lookup(architecture):
    model, stock = architecture.compressed(), architecture.shared_stock()
    # The end of the prompt stands in it before; what follows there is proposed, which stock refuses for placeholders.
    text = "<image>\nHow many red circles are there? How many red"
    batch = dict(architecture.processor()(images=tiny.pictures(1), text=text, return_tensors="pt"))
    plain = {name: value for name, value in batch.items() if not name.startswith("recovery")}
    options = {"prompt_lookup_num_tokens": 3, "new_tokens": 12}
    theirs = generate(stock, plain, **options)
    for setting in ({"enabled": False}, *({"budget": budget} for budget in architecture.whole_image)):
        assert torch.equal(generate(model, batch, token_recovery=setting, **options), theirs)
    for setting in (MODEL_SETTINGS["paper"], MODEL_SETTINGS["spread"]):
        greedy = new_ids(model, batch, token_recovery=setting, new_tokens=12)
        looked_up = new_ids(model, batch, token_recovery=setting, **options)
        assert torch.equal(looked_up[:, : greedy.shape[1]], greedy)  # 4.57 may give more than it was asked for


@each_architecture
@pytest.mark.parametrize("options", [OPTIONS["greedy"], OPTIONS["sequences"], OPTIONS["beam sequences"]])
def test_dict_output(architecture, options):
    model, batch = architecture.compressed(), architecture.encode()
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **options}
    set_seed(2)
    output = generate(model, batch, **wanted)
    set_seed(2)
    assert torch.equal(output.sequences, generate(model, batch, **options))
    new = output.sequences.shape[1] - batch["input_ids"].shape[1]
    rows = len(batch["input_ids"]) * options.get("num_beams", options.get("num_return_sequences", 1))
    assert [tuple(score.shape) for score in output.scores] == [(rows, model.config.get_text_config().vocab_size)] * new
    assert len(output.logits) == new
    assert torch.equal(output.visual_token_counts, model(**batch).visual_token_counts)
    if not options:
        first = model(**batch).logits[:, -1]
        torch.testing.assert_close(output.logits[0], first, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.stack(output.scores, dim=1).argmax(-1)[:, 0], output.sequences[:, -new])


@each_architecture
@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streamers_show_what_generate_returns(architecture, skip_prompt, capsys):
    model, batch = architecture.compressed(), architecture.encode(ROWS[1:2])
    tokenizer = architecture.processor().tokenizer
    ids = generate(model, batch, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))[0]
    shown = ids[batch["input_ids"].shape[1] :] if skip_prompt else ids
    text = tokenizer.decode(shown)
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=10)
    assert torch.equal(generate(model, batch, streamer=streamer)[0], ids)
    assert "".join(streamer) == text


@each_architecture
def test_stop_strings(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    tokenizer = architecture.processor().tokenizer
    ids = new_ids(model, batch, new_tokens=12)[0]
    pieces = [tokenizer.decode([index]) for index in ids.tolist()]
    stop = next(piece for piece in pieces[2:] if piece.isascii() and piece.strip() and piece not in pieces[:2])
    stopped = new_ids(model, batch, new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert len(stopped) == next(n for n in range(13) if stop in tokenizer.decode(ids[:n]))
    assert torch.equal(stopped, ids[: len(stopped)])


@each_architecture
def test_lengths_count_the_prompt_as_it_was_passed(architecture):
    model, batch = architecture.build(), architecture.encode()
    width, first = batch["input_ids"].shape[1], new_ids(model, batch)[:, 1]
    settings = {"do_sample": False, "pad_token_id": 3, "eos_token_id": first.tolist()}  # every row ends at once ...
    short = model.generate(**batch, **settings, max_length=width + 9)
    assert width < short.shape[1] < width + 9
    full = model.generate(**batch, **settings, max_length=width + 9, min_length=width + 8)
    assert full.shape[1] >= width + 8  # ... unless it must be longer
    config = GenerationConfig(max_length=width + 9, min_length=width + 8, bos_token_id=1, **settings)
    assert torch.equal(model.generate(**batch, generation_config=config), full)
    assert config.max_length == width + 9
    model.generation_config.update(max_length=width + 9, min_length=width + 8, **settings)
    assert torch.equal(model.generate(**batch), full)


@each_architecture
def test_arguments_of_a_call_override_the_generation_config(architecture):
    model, batch = architecture.build(), architecture.encode()
    width, first = batch["input_ids"].shape[1], new_ids(model, batch)[:, 1]
    model.generation_config.update(min_length=width + 8, eos_token_id=first.tolist())
    assert generate(model, batch, min_length=0, new_tokens=9).shape[1] < width + 8
    assert generate(model, batch, new_tokens=9).shape[1] >= width + 8


@each_architecture
def test_inputs_by_position_and_without_mask(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    ids = generate(model, batch)
    others = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(batch["input_ids"], **others, do_sample=False, max_new_tokens=6), ids)


@each_architecture
def test_a_shortened_batch_generates_with_its_positions(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    for setting in (MODEL_SETTINGS["paper"], MODEL_SETTINGS["spread"]):
        short = compressed(model, batch, setting)
        ids = generate(model, short)[:, short["input_ids"].shape[1] :]
        assert torch.equal(ids, new_ids(model, batch, token_recovery=setting))
