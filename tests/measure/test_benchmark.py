"""The benchmark end to end: it counts what the models report, and ratios are of one round. No time is judged."""

import json

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT
from noise import noise_inputs

from reccomp_hf.measure.benchmark import comparing, contenders, reporting
from reccomp_hf.measure.benchmark.comparing import RATIOS, budget_fields, compare, notes, ratios
from reccomp_hf.measure.benchmark.timing import Spread
from reccomp_hf.measure.cost import kv_cache_bytes

pytest_plugins = ("command_line",)

QUICK = ("--batch-sizes", "2", "--repeats", "2", "--new-tokens", "2", "--device", "cpu")


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
        lambda size: noise_inputs(model, size),
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
        inputs = noise_inputs(model, row["batch_size"])
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
    inputs = noise_inputs(model, 3)
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
    inputs = noise_inputs(model, 3)
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
    found = compare(model, lambda size: noise_inputs(model, size), **settings)
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
        compare(model, lambda size: noise_inputs(model, size), **settings)


def test_a_tiled_image_may_have_a_larger_budget():
    assert budget_fields(LLAVA_NEXT.compressed(), [120, "dynamic"]) == {
        120: {"budget": 120},
        "dynamic": {"budget": None},
    }


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_checkpoint(run, tmp_path):
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    code, out, err = run("bench", "demo", *QUICK, "--budgets", "dynamic,16", "--json", files[0], "--plot", files[1])
    assert (code, err) == (0, "")
    assert out.startswith("demo on cpu (") and out.endswith(f"Wrote {files[0]} and {files[1]}.\n")
    assert max(map(len, out.splitlines())) <= 160
    facts = json.loads(files[0].read_text())
    assert (facts["name"], facts["settings"]["rounds"], facts["settings"]["clock"]) == ("demo", 2, "wall clock")
    assert [row["budget"] for row in facts["rows"]] == ["dynamic", 16]
    cells = {line[:30].strip(): line[30:].split() for line in out.partition("batch 2, budget 16")[2].splitlines()}
    assert cells["visual tokens"] == ["144.0", "16.0", "16.0"]
    assert "There was no GPU" in out and "stages of ours under the profiler, ms: " in out
    assert files[1].stat().st_size > 10_000


def test_a_configuration_with_random_weights(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "reccomp_hf.measure.benchmark.named_config", lambda name, preset: LLAVA_NEXT.compressed().config
    )
    output = tmp_path / "bench.json"
    arguments = ("--budgets", "0.1", "--image-size", "70x50", "--dtype", "bfloat16", "--cpu-time", "--json", output)
    code, out, err = run("bench", "--config", "mid", *QUICK, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("mid with random weights on cpu (")
    facts = json.loads(output.read_text())
    assert (facts["environment"]["dtype"], facts["settings"]["clock"]) == ("bfloat16", "CPU seconds")
    assert (facts["picture"], facts["seed"]) == ([70, 50], 0)


def test_a_contender_that_did_not_run_leaves_a_dash():
    spread = {"median": 0.5, "low": 0.4, "high": 0.6, "values": [0.5]}
    seconds = {"prefill": spread, "decode": spread, "answer": spread}
    ran = {"seconds": seconds, "prompt_tokens": 9.0, "visual_tokens": 4.0, "kv_cache_bytes": 10}
    ran |= {"memory": {"beyond": 1e6}, "device_reads": 1}
    row = {"batch_size": 8, "budget": 64, "contenders": {"stock": None, "ours": ran, "oracle": ran}, "stages": {}}
    row["ratios"] = {
        f"{measure}, {pair}": None if "stock" in pair else spread
        for measure in seconds
        for pair in ("stock / ours", "ours / oracle")
    }
    lines = reporting._row_lines(row)
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "batch 8, budget 64 stock ours oracle stock / ours ours / oracle"
    assert words[1] == "prefill, ms - 500.00 500.00 - 0.50x [0.40, 0.60]"
    assert words[6] == "KV cache, MB - 0.0 0.0 - 1.00x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments MODEL --config --report is required"),
        (["demo", "--config", "mid"], "not allowed with argument"),
        (["demo", "--batch-sizes", "1,0"], "expected counts separated by commas as in 1,4,16, got '1,0'"),
        (["demo", "--budgets", "few"], "expected tokens, shares or dynamic"),
        (["demo", "--image-size", "640"], "expected width x height as in 640x480, got '640'"),
        (["demo", "--plot", "bench.txt"], "expected a file that ends in .png"),
        (["demo", "--preset", "paper"], "--preset goes with --config"),
        (["--config", "llava-2"], "invalid choice: 'llava-2' (choose from"),
        (["demo", "--budgets", "145", "--device", "cpu"], "an image has only 144 patches"),
        (["demo", "--repeats", "0"], "--repeats: expected a whole number of at least 1, got '0'"),
        (["no/such/folder"], "no/such/folder does not exist"),
    ],
)
def test_errors_are_one_line(error, arguments, message):
    assert message in error("bench", *arguments)


def test_the_largest_batch_is_refused_without_a_gpu(error):
    message = error("bench", "demo", *QUICK, "--budgets", "16", "--largest-batch")
    assert "searched for on a GPU" in message
