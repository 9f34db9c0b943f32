"""The benchmark end to end: it counts what the models report, and ratios are of one round. No time is judged."""

import json

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT

from reccomp_hf.measure.benchmark import capacity, comparing, contenders, counting, stages
from reccomp_hf.measure.benchmark.batches import noise_batch
from reccomp_hf.measure.benchmark.comparing import RATIOS, budget_fields, compare, notes, ratios
from reccomp_hf.measure.benchmark.models import MID, named_config, random_model, sharpen
from reccomp_hf.measure.benchmark.timing import Spread, Stopwatch, interleave
from reccomp_hf.measure.cost import kv_cache_bytes, parameter_counts

CPU = torch.device("cpu")
PICTURE = (70, 50)  # pixels, for LLaVA-NeXT


def inputs_of(model, size=2, **kwargs):
    return noise_batch(model, size, PICTURE, text_tokens=12, question_tokens=5, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def one_profiled_turn():
    """The profiler's bookkeeping takes longer than a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "PROFILED", 1)
        yield


@pytest.fixture(scope="module", params=[LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
def measured(request, one_profiled_turn):
    """A tiny model and what `compare` found of it."""
    model = request.param.compressed()
    found = compare(
        model,
        lambda size: inputs_of(model, size),
        batch_sizes=(1, 3),
        budgets=("dynamic", 0.25),
        new_tokens=2,
        rounds=3,
        progress=False,
    )
    return model, found


# ---- comparing -----------------------------------------------------------------------------------------------------


def test_rows_are_json_and_complete(measured):
    _, found = measured
    assert json.loads(json.dumps(found)) == found
    assert {"environment", "settings", "rows", "notes", "weight_bytes", "device_reads_are"} <= found.keys()
    assert {"torch", "transformers", "device", "dtype", "threads"} <= found["environment"].keys()
    assert (found["environment"]["dtype"], found["environment"]["device"]) == ("float32", "cpu")
    assert [(row["batch_size"], row["budget"]) for row in found["rows"]] == [
        (size, budget) for size in (1, 3) for budget in ("dynamic", 0.25)
    ]
    assert "no GPU" in found["notes"][0]
    for row in found["rows"]:
        assert list(row["contenders"]) == ["stock", "ours", "oracle"]
        for facts in row["contenders"].values():
            assert {len(spread["values"]) for spread in facts["seconds"].values()} == {3}
            assert facts["seconds"].keys() == {"prefill", "decode", "answer"}
            assert facts["memory"]["beyond"] > 0 and facts["memory"]["total"] is None


def test_token_counts_are_those_of_the_model(measured):
    model, found = measured
    for row in found["rows"]:
        inputs = inputs_of(model, row["batch_size"])
        fields = {"budget": None if row["budget"] == "dynamic" else row["budget"]}
        with torch.no_grad():
            output = model(**inputs, token_recovery=fields)
        newlines = 0 if output.newline_counts is None else output.newline_counts
        tokens = (output.visual_token_counts + newlines).float().mean().item()
        facts = row["contenders"]["ours"]
        assert facts["visual_tokens"] == pytest.approx(tokens)
        assert facts["prompt_tokens"] == pytest.approx(tokens + 12)
        assert facts["prompt_length"] == output.logits.shape[1]
        stock = row["contenders"]["stock"]
        assert stock["prompt_length"] == inputs["input_ids"].shape[1] == stock["visual_tokens"] + 12


def test_the_oracle_reads_what_ours_reads(measured):
    for row in measured[1]["rows"]:
        ours, oracle = row["contenders"]["ours"], row["contenders"]["oracle"]
        for name in ("prompt_tokens", "prompt_length", "visual_tokens", "kv_cache_bytes"):
            assert ours[name] == oracle[name], name


def test_cache_bytes_are_the_closed_form(measured):
    model, found = measured
    for row in found["rows"]:
        for facts in row["contenders"].values():
            wide = kv_cache_bytes(model.config, facts["prompt_length"], "fp16") * 2  # float32
            assert facts["kv_cache_bytes"] == row["batch_size"] * wide


def test_device_reads_of_stock_do_not_depend_on_the_budget(measured):
    for size in (1, 3):
        rows = [row["contenders"] for row in measured[1]["rows"] if row["batch_size"] == size]
        assert len({row["stock"]["device_reads"] for row in rows}) == 1
        # Ours reads the numbers that shapes depend on, and nothing else.
        assert all(row["ours"]["device_reads"] > row["oracle"]["device_reads"] for row in rows)


def test_stages_lie_within_the_whole(measured):
    for row in measured[1]["rows"]:
        assert row["stages"]["whole"]["median"] > 0
        for stage, seconds in row["stages"].items():
            assert seconds["median"] >= 0, stage
            assert all(
                one <= two for one, two in zip(seconds["values"], row["stages"]["whole"]["values"], strict=True)
            )


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{"budget": 16}, {"budget": 16, "position_ids": "original"}, {"budget": None}], ids=str
)
@pytest.mark.parametrize("architecture", [LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
def test_all_three_answer_what_generate_answers(architecture, fields):
    model = architecture.compressed()
    inputs = inputs_of(model, 3)
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    length, eos = inputs["input_ids"].shape[1], model.generation_config.eos_token_id
    for make, section in (
        (contenders.ours, fields),
        (contenders.oracle, fields),
        (contenders.stock, {"enabled": False}),
    ):
        arguments = (model, inputs) if make is contenders.stock else (model, inputs, fields)
        contender = make(*arguments)
        ids = contender.decode(contender.prefill(), 4)
        expected = model.generate(**inputs, **settings, token_recovery=section)[:, length:]
        assert eos not in ids.tolist()[0]  # min_new_tokens would have changed it
        assert torch.equal(ids, expected), make.__name__


@pytest.mark.parametrize("architecture", [LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
def test_new_tokens_take_the_place_behind_the_prompt(architecture):
    model = architecture.compressed()
    inputs = inputs_of(model, 3)
    whole = inputs["attention_mask"].sum(-1)
    for make in (contenders.ours, contenders.oracle):
        original = make(model, inputs, {"budget": 16, "position_ids": "original"})
        assert torch.equal(original.next_position, whole)  # of the prompt as it was passed
        compact = make(model, inputs, {"budget": 16, "position_ids": "compact"})
        assert torch.equal(compact.next_position, compact.attention_mask.sum(-1))
        assert (compact.next_position < whole).all()
    assert torch.equal(contenders.stock(model, inputs).next_position, whole)


def test_ratios_are_taken_within_a_round():
    # A machine that slows down by ten from round to round: every round says 4 times, the medians of the times do not.
    slow = {"stock": (4.0, 40.0, 400.0), "ours": (1.0, 10.0, 100.0), "oracle": (1.0, 5.0, 100.0)}
    times = {
        name: {measure: Spread(values) for measure in ("prefill", "decode", "answer")} for name, values in slow.items()
    }
    found = ratios(times)
    assert found.keys() == RATIOS.keys()
    assert found["prefill, stock / ours"] == {"median": 4, "low": 4, "high": 4, "values": [4, 4, 4]}
    assert found["decode, ours / oracle"]["values"] == [1, 2, 1]
    assert found["decode, ours / oracle"]["high"] == 1.5


def test_what_did_not_fit_is_said():
    spread = {"prefill": Spread((1.0,)), "decode": Spread((1.0,)), "answer": Spread((1.0,))}
    found = ratios({"ours": spread, "oracle": spread})
    assert found["prefill, stock / ours"] is None and found["prefill, ours / oracle"]["median"] == 1
    row = {"batch_size": 64, "budget": "dynamic", "contenders": {"stock": None, "ours": {}, "oracle": {}}}
    assert notes(torch.device("cuda"), [row]) == ["Out of memory: stock at batch size 64, dynamic."]


def test_a_contender_without_memory_is_left_out(monkeypatch):
    model = LLAVA.compressed()
    whole = contenders.Contender.turn

    def turn(self, *arguments):
        if self.attention_mask.shape[1] > 100:
            raise torch.cuda.OutOfMemoryError("no")
        return whole(self, *arguments)

    monkeypatch.setattr(contenders.Contender, "turn", turn)
    settings = {"batch_sizes": (2,), "budgets": (16,), "new_tokens": 1, "rounds": 1, "progress": False}
    found = compare(model, lambda size: inputs_of(model, size), **settings)
    assert found["rows"][0]["contenders"]["stock"] is None
    assert found["rows"][0]["contenders"]["ours"]["prompt_length"] == 28
    assert found["rows"][0]["ratios"]["answer, stock / ours"] is None
    assert "Out of memory: stock at batch size 2, 16." in found["notes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"new_tokens": 0}, "new tokens must be at least 1, got 0"),
        ({"batch_sizes": (4, 0)}, "batch size 0 must be at least 1"),
        ({"budgets": (101,)}, "budget is 101, but an image has only 100 patches"),
        ({"budgets": (1.5,)}, "budget"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    model = LLAVA.compressed()
    with pytest.raises(ValueError, match=message):
        compare(model, lambda size: inputs_of(model, size), **settings)


def test_a_tiled_image_may_have_a_larger_budget():
    assert budget_fields(LLAVA_NEXT.compressed(), [120, "dynamic"]) == {
        120: {"budget": 120},
        "dynamic": {"budget": None},
    }


# ---- timing --------------------------------------------------------------------------------------------------------


def test_turns_alternate():
    order = []

    def turn(name):
        return lambda: order.append(name) or {"seconds": len(order)}

    found = interleave({name: turn(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert found["c"]["seconds"].values == (3, 4, 9)
    with pytest.raises(ValueError, match="at least one round, got 0"):
        interleave({}, 0)


def test_spreads():
    spread = Spread((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (spread.low, spread.median, spread.high) == (2, 3, 4)
    assert spread.over(Spread((1.0, 1.0, 1.0, 2.0, 50.0))).values == (1, 2, 3, 2, 2)
    assert spread.scaled(2).median == 6
    with pytest.raises(ValueError, match="equally many rounds, got 5 and 1"):
        spread.over(Spread((1.0,)))


def test_the_stopwatch_returns_what_the_work_returned():
    for cpu_time, clock in ((False, "wall clock"), (True, "CPU seconds")):
        stopwatch = Stopwatch(CPU, cpu_time)
        seconds, result = stopwatch.time(lambda: sum(range(100_000)))
        assert seconds > 0 and result == 4_999_950_000
        assert stopwatch.clock == clock
    with pytest.raises(ValueError, match="CPU seconds say nothing about cuda"):
        Stopwatch(torch.device("cuda"), cpu_time=True)


# ---- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda values: values.tolist(), 1),
        (lambda values: values.repeat(3, 1).tolist(), 1),  # however many elements
        (lambda values: values.sum().item(), 1),
        (lambda values: bool(values.any()), 1),
        (lambda values: values.nonzero(), 1),
        (lambda values: values[values > 1], 1),
        (lambda values: values.repeat_interleave(values), 1),
        (lambda values: values.cpu().numpy(), 2),
        (lambda values: values.cumsum(0)[torch.tensor([1])] + 1, 0),
    ],
)
def test_device_reads(read, count):
    values = torch.tensor([1, 2])
    assert counting.device_reads(lambda: read(values), CPU) == count
    assert values.tolist() == [1, 2]  # and nothing stays behind


def test_peak_memory_is_what_was_held_at_once():
    def work():
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(1000, 500)  # 2 MB
        del first
        return torch.empty(1000, 100), second  # 0.4 MB

    assert counting.peak_memory(work, CPU)["beyond"] == 3_000_000


def test_stages_are_read_from_ranges():
    def work():
        with torch.profiler.record_function("reccomp::outer"):
            torch.ones(10).sum()
            for _ in range(2):
                with torch.profiler.record_function("reccomp::inner"):
                    torch.ones(10).sum()
        torch.ones(10).sum()

    found = stages.stage_seconds(work, CPU)
    assert found.keys() == {"outer", "inner", stages.WHOLE, stages.REST}
    assert found["inner"] < found["outer"] < found[stages.WHOLE]
    # What lies within a stage is not taken off twice.
    assert found[stages.REST] == pytest.approx(found[stages.WHOLE] - found["outer"])


@pytest.mark.parametrize("capacity_of_machine", [0, 1, 2, 3, 8, 13, 31, 32, 40])
def test_the_largest_batch_is_found(capacity_of_machine):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= capacity_of_machine

    assert capacity.largest(fits, limit=32) == min(capacity_of_machine, 32)
    assert max(tried) <= 32 and len(tried) == len(set(tried))


def test_the_largest_batch_needs_a_gpu():
    with pytest.raises(ValueError, match="searched for on a GPU; the model is on cpu"):
        capacity.largest_batches(LLAVA.compressed(), lambda size: {})


def test_work_that_does_not_fit():
    def work():
        raise torch.cuda.OutOfMemoryError("no")

    assert not capacity.runs(work)
    assert capacity.runs(lambda: None)


# ---- models and inputs ---------------------------------------------------------------------------------------------


def test_the_mid_size_configuration():
    config = named_config(MID, "paper")
    counts = parameter_counts(config)
    assert 280e6 < counts["language_model"] < 320e6
    assert counts["vision_tower"] < counts["language_model"] / 10
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 == 576
    assert named_config(MID, "balanced").token_recovery.budget == 64
    assert named_config("llava-1.5-13b", "balanced").text_config.hidden_size == 5120
    with pytest.raises(ValueError, match=r"Unknown configuration 'big'; known ones are mid, llava-1\.5-7b"):
        named_config("big", "paper")


@pytest.mark.parametrize("architecture", [LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
def test_random_models_are_built_in_their_dtype(architecture):
    config = architecture.compressed().config
    before = config.to_dict()
    model = random_model(config, CPU, torch.bfloat16)
    assert config.to_dict() == before, "the config is the caller's"
    assert isinstance(model, architecture.model_class) and not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    again = random_model(config, CPU, torch.bfloat16)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_sharpening_gives_the_dynamic_mode_something_to_keep():
    model = random_model(LLAVA.compressed().config, CPU, torch.float32)
    inputs = inputs_of(model, 4)

    def share():
        return sum(int(record.counts.sum()) for record in model.recover(**inputs)) / 400

    before = share()
    sharpen(model, inputs, share=0.2)
    assert abs(share() - 0.2) <= abs(before - 0.2)
    sharpen(model, inputs, share=before)  # starts from what is there
    assert share() == pytest.approx(before, abs=abs(before - 0.2))


def test_noise_is_the_seeds_and_every_row_asks_another_question():
    model = LLAVA_NEXT.compressed()
    one, two, other = (inputs_of(model, 3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert len({tuple(row) for row in one["recovery_input_ids"].flatten(1).tolist()}) == 3
    assert one["image_sizes"].tolist() == [[50, 70]] * 3
    with pytest.raises(ValueError, match="text tokens must be at least 2, got 1"):
        noise_batch(model, 1, PICTURE, text_tokens=1)
    with pytest.raises(ValueError, match="question tokens must be 2 to 77, got 78"):
        noise_batch(model, 1, PICTURE, question_tokens=78)
