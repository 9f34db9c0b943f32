"""Whatever reads ids while `generate` runs sees the prompt as it was passed, not the shortened one."""

import warnings

import pytest
import torch
from architectures import ROWS, each_architecture, generate
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    WatermarkingConfig,
    set_seed,
)

from reccomp_hf.core.splicing import counted_positions

STEPS = 6
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@each_architecture
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_callbacks_read_the_passed_prompt(architecture, mode):
    rows = ROWS[:1] if "prompt_lookup_num_tokens" in mode else ROWS
    model, batch, seen = architecture.compressed(), architecture.encode(rows), {}
    prompt = batch["input_ids"]

    def processor(ids, scores):
        seen.setdefault("processor", []).append(ids.clone())
        return scores

    def criterion(ids, scores, **kwargs):
        seen.setdefault("criterion", []).append(ids.clone())
        return torch.zeros(len(ids), dtype=torch.bool)

    def allowed(row, ids):
        # 4.57 counts copies of a row as rows
        assert any(torch.equal(ids[: prompt.shape[1]], passed) for passed in prompt)
        seen.setdefault("allowed", []).append(len(ids))
        return list(range(20, 60))

    callbacks = {"logits_processor": LogitsProcessorList([processor]), "prefix_allowed_tokens_fn": allowed}
    callbacks["stopping_criteria"] = StoppingCriteriaList([criterion])
    set_seed(3)
    output = generate(model, batch, new_tokens=STEPS, **callbacks, **mode)
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    assert seen["allowed"][0] == prompt.shape[1]
    for name in ("processor", "criterion"):
        for shown in seen[name]:
            copies = shown.shape[0] // len(prompt)
            assert torch.equal(shown[:, : prompt.shape[1]], prompt.repeat_interleave(copies, dim=0))
            if "num_beams" not in mode and "prompt_lookup_num_tokens" not in mode:
                assert torch.equal(shown, ids[:, : shown.shape[1]])
    assert all(token in range(20, 60) for token in ids[0, prompt.shape[1] :].tolist())


@each_architecture
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_criterion_that_counts_from_the_passed_prompt_stops(architecture, mode):
    model, batch = architecture.compressed(), architecture.encode()
    length = batch["input_ids"].shape[1]

    def two_new(ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= length + 2)

    ids = generate(model, batch, stopping_criteria=[two_new], min_new_tokens=STEPS, new_tokens=STEPS, **mode)
    assert ids.shape[1] == length + 2


BUILT_IN = {
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 4,
    "min_new_tokens": 4,
    "forced_eos_token_id": 2,
    "forced_bos_token_id": 9,
    "exponential_decay_length_penalty": (2, 30.0),
    "begin_suppress_tokens": [*range(20, 200)],
    "suppress_tokens": [*range(20, 150)],
    "sequence_bias": {(30,): 9.0, (30, 31): 40.0},
    "bad_words_ids": [[token] for token in range(20, 120)],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(greenlist_ratio=0.25, bias=20.0),
}


@torch.no_grad()
def by_hand(architecture, batch, options):
    """Greedy ids of the stock language model on the compressed prompt, with stock processors built for the passed one.

    No `generate` is called.
    """
    model, stock, ids = architecture.compressed(), architecture.shared_stock(), batch["input_ids"]
    short, _ = model.compress_inputs(**batch)
    embeds, mask, length = short["inputs_embeds"], short["attention_mask"], ids.shape[1]
    config = GenerationConfig(
        **{**options, "max_length": length + STEPS, "eos_token_id": 2, "num_beams": 1, "use_cache": True}
    )
    config._eos_token_tensor = torch.tensor([2])
    if "min_new_tokens" in options:
        config.min_length = length + options["min_new_tokens"]
    processors = GenerationMixin._get_logits_processor(
        stock, config, length, ids, device="cpu", model_kwargs={"attention_mask": batch["attention_mask"]}
    )
    for _ in range(STEPS):
        positions = counted_positions(mask)
        states = stock.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        scores = processors(ids, stock.lm_head(states.last_hidden_state[:, -1]))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        embeds = torch.cat([embeds, stock.get_input_embeddings()(ids[:, -1:])], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@each_architecture
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_processors_are_those_of_the_passed_prompt(architecture, name):
    model, batch = architecture.compressed(), architecture.encode((ROWS[0], ROWS[2]))  # one is padded
    options, length = {name: BUILT_IN[name]}, batch["input_ids"].shape[1]
    if name == "min_length":
        options[name] += length
    expected = by_hand(architecture, batch, options)
    if name == "forced_eos_token_id":  # read where max_length says
        options |= {"max_length": length + STEPS, "max_new_tokens": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Passing `encoder_")  # "... requires some form of `input_ids`"
        ids = generate(model, batch, new_tokens=options.pop("max_new_tokens", STEPS), **options)
        short, _ = model.compress_inputs(**batch)
        resumed = generate(model, short, new_tokens=STEPS, **{name: BUILT_IN[name]}) if "encoder" in name else None
    for row, wanted in zip(ids, expected, strict=True):
        new = wanted[length:].tolist()
        end = length + (new.index(2) + 1 if 2 in new else STEPS)
        assert torch.equal(row[:end], wanted[:end])
    if resumed is not None:
        assert torch.equal(resumed[:, short["input_ids"].shape[1] :], ids[:, length:])


@each_architecture
@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 8}, {"token_healing": True}], ids=lambda row: next(iter(row))
)
def test_options_that_read_a_prompt_as_ids_are_refused(architecture, options):
    model, batch = architecture.build(), architecture.encode(ROWS[:1])
    ((name, value),) = options.items()
    short, _ = model.compress_inputs(**batch)
    message = rf"{name} is {value}, which reads the prompt as ids and would lose its images.*Leave it out"
    for inputs in (batch, short):
        for call in (options, {"generation_config": GenerationConfig(max_new_tokens=2, **options)}):
            with pytest.raises(ValueError, match=message):
                model.generate(**inputs, **call)
    model.generation_config.update(**options)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch)


@each_architecture
def test_text_alone_is_read_in_chunks(architecture):
    model, ids = architecture.compressed(), torch.tensor([[1, *range(20, 40)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours, whole, stock = (
        generate(model, inputs, prefill_chunk_size=8),
        generate(model, inputs),
        generate(architecture.shared_stock(), inputs, prefill_chunk_size=8),
    )
    assert torch.equal(ours, stock)
    assert torch.equal(ours, whole)
