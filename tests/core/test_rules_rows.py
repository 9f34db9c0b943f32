"""Rows of a batch under different rules: each is read as it is alone."""

import copy

import pytest
import tiny
import torch
from architectures import (
    LLAVA,
    OF_THE_STOCK_CONFIG,
    assert_clear_choices,
    assert_same_records,
    call,
    each_architecture,
    each_side,
    generate,
    labels_of,
)
from host_reads import HostReads
from prefill_elsewhere import costs_elsewhere
from tape import TapeRecorder

from reccomp_hf.core import front
from reccomp_hf.core.graphs import GraphCache

RULES = [
    {"begins": "how many", "budget": 12},
    {"begins": ["describe", "is it"], "budget": None},
    {"begins": "where", "method": "trim", "budget": 9},
    {"begins": "which", "text_share": 0.0, "budget": 0.2, "visual_layer": -2},
    {"begins": "say", "budget": 3},
]
ROWS = (
    ("What is the colour of the small square?", 1),
    ("How many red circles are there?", 2),
    ("Is it on the left or on the right?", 1),
    ("Where is the table?", 1),
    ("Which one is huge?", 1),
    ("How many green triangles?", 1),
    ("Say hello.", 0),
)
RULE_OF_ROW = [-1, 0, 1, 2, 3, 0, 4]
COMMON = {"budget": 20, "text_relevance": "value", "rules": RULES}
STARTS = [sum(images for _, images in ROWS[:row]) for row in range(len(ROWS))]


def encode(architecture, rows=ROWS, first=0, side="left"):
    processor = architecture.processor(side)
    return dict(processor(**call(rows, first), recovery_rules=RULES, return_tensors="pt", padding=True))


def alone(architecture, row, side="left"):
    return encode(architecture, [ROWS[row]], STARTS[row], side)


def settings_of(row):
    rule = RULE_OF_ROW[row]
    changed = {name: value for name, value in RULES[rule].items() if name != "begins"} if rule >= 0 else {}
    common = {"budget": 20} if "method" in changed else COMMON  # another method has its own text_relevance
    return {**common, "rules": [], **changed}


@torch.no_grad()
@each_side
@each_architecture
def test_a_mixed_batch_answers_as_single_rows_with_the_rules_settings(architecture, side):
    """Two routes to the same: rules in a batch, and the rule's fields as one call's settings for a row alone."""
    model, batch = architecture.compressed(), encode(architecture, side=side)
    assert batch["recovery_rule"].tolist() == RULE_OF_ROW
    records = model.recover(**batch, token_recovery=COMMON)
    logits = last_logits(model, batch, COMMON)
    ids = generate(model, batch, token_recovery=COMMON)[:, batch["input_ids"].shape[1] :]
    for row, (_, images) in enumerate(ROWS):
        single = alone(architecture, row, side)
        wanted = last_logits(model, single, settings_of(row))[0]
        torch.testing.assert_close(logits[row], wanted, atol=2e-5, rtol=1e-4)
        best, second = wanted.topk(2).values
        assert best - second > 1e-3  # no near tie
        assert logits[row].argmax() == wanted.argmax()
        new = generate(model, single, token_recovery=settings_of(row))[0, single["input_ids"].shape[1] :]
        assert side == "right" or ids[row].equal(new)  # nothing is generated behind padding
        if images:
            theirs = model.recover(**single, token_recovery=settings_of(row))
            assert_same_records(records[STARTS[row] : STARTS[row] + images], theirs)


def fixed_rules(method="trim"):
    """Without a number of tokens that adapts to the image."""
    return [
        {**rule, "budget": rule["budget"] or 7, **({"method": method} if "method" in rule else {})} for rule in RULES
    ]


def last_logits(model, batch, fields):
    short, _ = model.compress_inputs(**batch, token_recovery=fields)
    last = short["attention_mask"].shape[1] - 1 - short["attention_mask"].flip(-1).argmax(-1)
    return model(**short).logits[torch.arange(len(last)), last]


@each_architecture
def test_no_choice_is_a_near_tie(architecture):
    for row, (_, images) in enumerate(ROWS):
        if images:
            assert_clear_choices(architecture.compressed(), alone(architecture, row), settings_of(row))


@torch.no_grad()
@each_architecture
def test_counts_and_the_record_are_in_the_images_order(architecture):
    model, batch = architecture.compressed(), encode(architecture)
    output = generate(model, batch, token_recovery=COMMON, return_dict_in_generate=True)
    counts, record = output.visual_token_counts, output.token_recovery
    patches = [int(choice.kept_mask.numel()) for choice in model.recover(**batch, token_recovery={"budget": 1.0})]
    assert counts[[0, 1, 2, 4, 6]].tolist() == [20, 12, 12, 9, 12]
    assert counts[5] == pytest.approx(0.2 * patches[5], rel=0.35)  # a tile's padding is no patch
    tiles = [len(choice.counts) for choice in model.recover(**batch, token_recovery=COMMON)]
    for one, other in zip(record.split(tiles), model.recover(**batch, token_recovery=COMMON), strict=True):
        assert one.kept_mask.equal(other.kept_mask)
        torch.testing.assert_close(one.tokens, other.tokens)
        if other.text_similarity is None:
            assert one.text_similarity.eq(-torch.inf).all()
        else:
            torch.testing.assert_close(one.text_similarity, other.text_similarity)


@torch.no_grad()
@each_architecture
def test_encoded_images_serve_every_rule(architecture, monkeypatch):
    model, batch = architecture.compressed(), encode(architecture)
    wanted = generate(model, batch, token_recovery=COMMON)
    runs, states = [], type(model)._states

    def counted(self, *arguments):
        runs.append(arguments)
        return states(self, *arguments)

    monkeypatch.setattr(type(model), "_states", counted)
    assert generate(model, batch, token_recovery=COMMON).equal(wanted)
    assert len(runs) == 1  # the vision tower runs once for all groups
    pixels, sizes = batch.pop("pixel_values"), batch.pop("image_sizes", None)
    encoded = model.encode_images(pixels, sizes, token_recovery=COMMON)
    assert generate(model, {**batch, "pixel_values": encoded}, token_recovery=COMMON).equal(wanted)
    assert len(runs) == 2


@torch.no_grad()
@each_architecture
def test_rules_read_the_device_once_more(architecture, monkeypatch):
    model = architecture.build(**COMMON)
    for rules, extra in ((RULES, 1), (fixed_rules(), 1), ([], 0)):
        model.config.token_recovery = {"rules": rules}
        batch = encode(architecture)
        model.compress_inputs(**batch)  # constants are made
        with HostReads(monkeypatch) as reads:
            model.compress_inputs(**batch)
        assert len(reads.seen) == architecture.host_reads + extra, reads.seen


@torch.no_grad()
@each_architecture
def test_groups_stay_on_the_device(architecture, monkeypatch):
    """Apart from the two reads, which are answered from outside, nothing leaves the device: it would raise."""
    stock, known = front.read_rules_of_images, []

    def noted(rule, rows, count):
        if not known:
            known.append(stock(rule, rows, count))
        return known[0]

    monkeypatch.setattr(front, "read_rules_of_images", noted)
    batch = encode(architecture)
    fixed = {**COMMON, "rules": fixed_rules()}
    assert len(costs_elsewhere(architecture, batch, fixed)) == 2
    assert len(set(known[0][0])) == 5


@torch.no_grad()
@each_architecture
def test_groups_are_recorded_one_by_one(architecture, caplog):
    model, batch = copy.deepcopy(architecture.compressed()), encode(architecture)
    fixed = {**COMMON, "rules": fixed_rules(method="recoverable")}  # of LLaVA-NeXT, "trim" cannot be recorded
    dynamic = {**fixed, "rules": [fixed["rules"][0], RULES[1], *fixed["rules"][2:]]}
    wanted = [generate(model, batch, token_recovery=fields) for fields in (fixed, dynamic)]
    model._graphs = GraphCache(recorder=TapeRecorder())
    for _ in range(2):
        assert generate(model, batch, token_recovery=fixed).equal(wanted[0])
    recorded = [key[0] for key in model._graphs._recordings]
    assert sorted(set(recorded)) == ["front", "language model", "vision tower"]
    assert recorded.count("front") == 5  # the common settings and four rules with images
    assert not caplog.records
    for _ in range(2):  # one rule adapts to the image: its group alone runs without a recording
        assert generate(model, batch, token_recovery=dynamic).equal(wanted[1])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The front runs without a CUDA graph: it cannot be recorded: the number of tokens depends" in said


@torch.no_grad()
@each_architecture
def test_settings_of_a_call_hold_for_all_rows(architecture):
    model, batch = architecture.build(**COMMON), encode(architecture)
    mixed = model(**batch).visual_token_counts
    assert model(**batch, token_recovery={"position_ids": "original"}).visual_token_counts.equal(mixed)
    assert model(**batch, token_recovery={}).visual_token_counts.equal(mixed)
    assert model(**batch, token_recovery={"budget": 5}).visual_token_counts.tolist() == [5] * 7
    assert model(**batch, token_recovery={"rules": []}).visual_token_counts.tolist() == [20] * 7
    other = model(**batch, token_recovery={"rules": [{"begins": "a", "budget": 2}] * 5}).visual_token_counts
    assert other.tolist() == [20] + [2] * 6
    without = {name: value for name, value in batch.items() if name != "recovery_rule"}
    assert model(**without, token_recovery={"budget": 5}).visual_token_counts.tolist() == [5] * 7
    assert model(**without, token_recovery={"enabled": False}).visual_token_counts is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (None, r"rules need the rule of every row: recovery_rule is None.*AutoProcessor.*\{'rules': \[\]\}"),
        ([0] * 7, r"recovery_rule must be a tensor, got list"),
        (torch.zeros(7), r"recovery_rule must be an integer tensor of 1 dimensions"),
        (torch.zeros(7, 1, dtype=torch.long), r"recovery_rule must be an integer tensor of 1 dimensions"),
        (torch.zeros(6, dtype=torch.long), r"recovery_rule must have one entry per row: got 6, expected 7"),
        (torch.tensor([0, 0, 5, 0, 0, 0, 0]), r"recovery_rule of row 2 is 5, but token_recovery has 5 rule"),
        (torch.tensor([0, 0, 0, 0, 0, 0, -2]), r"recovery_rule of row 6 is -2"),
    ],
    ids=["none", "list", "float", "shape", "short", "large", "small"],
)
@each_architecture
def test_rows_without_a_valid_rule(architecture, rule, message):
    model, batch = architecture.compressed(), {**encode(architecture), "recovery_rule": rule}
    for run in (model, model.generate, model.recover, model.compress_inputs):
        with pytest.raises(ValueError, match=message):
            run(**batch, token_recovery=COMMON)


@torch.no_grad()
@each_architecture
def test_a_question_is_needed_where_the_rules_settings_read_it(architecture):
    model = architecture.compressed()
    for row, needed in ((0, True), (1, True), (4, False)):
        batch = encode(architecture)
        batch["recovery_attention_mask"][row] = 0
        if needed:
            with pytest.raises(ValueError, match=f"Row {row} has an image but no question"):
                model.compress_inputs(**batch, token_recovery=COMMON)
        else:
            model.compress_inputs(**batch, token_recovery=COMMON)
    batch = {**encode(architecture), "recovery_input_ids": None}
    with pytest.raises(ValueError, match="Text recovery needs the question"):
        model(**batch, token_recovery=COMMON)


def labels(model, batch):
    """Without the first token of a row, which only padding precedes."""
    return labels_of(model, batch).masked_fill(batch["input_ids"] == model.generation_config.bos_token_id, -100)


@each_architecture
def test_losses_and_gradients_are_those_of_single_rows(architecture):
    model, rows = architecture.build(**COMMON), (1, 4, 2)
    chosen = [ROWS[row] for row in rows]
    # Pictures follow one another in `encode`, so that these rows have others than in ROWS.
    batch, starts = encode(architecture, chosen), [0, 2, 3]
    singles = [encode(architecture, [row], start) for row, start in zip(chosen, starts, strict=True)]
    output = model(**batch, labels=labels(model, batch))
    output.loss.backward()
    found = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    model.zero_grad()
    counts = [int((labels(model, single) != -100).sum()) for single in singles]
    losses = [model(**single, labels=labels(model, single)).loss for single in singles]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(output.loss, mean, atol=1e-5, rtol=1e-5)
    mean.backward()
    torch.testing.assert_close(found, model.model.multi_modal_projector.linear_1.weight.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)
@each_architecture
def test_beams_and_lookup(architecture, options):
    model, rows = architecture.compressed(), (0, 1, 2)
    if "prompt_lookup_num_tokens" in options:
        rows = (1,)
    batch = encode(architecture, [ROWS[row] for row in rows])
    ids = generate(model, batch, token_recovery=COMMON, **options)[:, batch["input_ids"].shape[1] :]
    copies = options.get("num_return_sequences", 1)
    for place, start in enumerate([0, 1, 3][: len(rows)]):
        single = encode(architecture, [ROWS[rows[place]]], start)
        wanted = generate(model, single, token_recovery=settings_of(rows[place]), **options)
        new = wanted[:, single["input_ids"].shape[1] :]
        width = min(new.shape[1], ids.shape[1])
        assert ids[place * copies : (place + 1) * copies, :width].equal(new[:, :width])


@torch.no_grad()
@each_architecture
def test_the_inner_model_reads_rules(architecture):
    model, batch = architecture.build(**COMMON), encode(architecture)
    states = model.model(**batch).last_hidden_state
    assert states.shape[:2] == batch["input_ids"].shape
    for row in (0, 1, 4):
        single = alone(architecture, row)
        torch.testing.assert_close(
            states[row, -1], model.model(**single).last_hidden_state[0, -1], atol=2e-5, rtol=1e-4
        )
    with pytest.raises(ValueError, match="recovery_rule is None"):
        model.model(**{**batch, "recovery_rule": None})


@torch.no_grad()
def test_a_visual_only_model_reads_rules():
    section = {"budget": 20, "rules": RULES}
    config = {name: value for name, value in tiny.llava_config().to_dict().items() if name not in OF_THE_STOCK_CONFIG}
    model = LLAVA.model_class(LLAVA.config_class(token_recovery=section, **config)).eval()
    processor = LLAVA.processor(recovery_tokenizer=None)
    processor.recovery_rules = model.config.token_recovery.rules
    rows = [ROWS[0], ("How many?", 1), ROWS[4]]
    batch = dict(processor(**call(rows), return_tensors="pt", padding=True))
    assert model(**batch).visual_token_counts.tolist() == [20, 12, 20]


@torch.no_grad()
@each_architecture
def test_rows_without_images_may_have_any_rule(architecture):
    model, batch = architecture.build(**COMMON), encode(architecture, [ROWS[6], ROWS[0]])
    assert batch["recovery_rule"].tolist() == [4, -1]
    assert model(**batch).visual_token_counts.tolist() == [20]
    text = encode(architecture, [ROWS[6]])
    assert model(**text).visual_token_counts is None
    assert generate(model, text).shape[0] == 1
    inputs, record = model.compress_inputs(**text)
    assert record is None
    assert inputs["recovery_rule"].tolist() == [4]
    assert generate(model, inputs).equal(generate(model, text))


@torch.no_grad()
def test_a_wrong_number_of_placeholders_is_named():
    model, batch = LLAVA.compressed(), encode(LLAVA)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][2, -3:] = tiny.SPECIAL_TOKENS.index("<image>")
    with pytest.raises(ValueError, match="Image placeholders and images do not match"):
        model(**batch, token_recovery=COMMON)
