"""`reccomp-hf bench`: tables for people, JSON and pictures in files, errors in a line."""

import json

import pytest

from reccomp_hf.cli import bench
from reccomp_hf.experiments.selection import choosing, scaling
from reccomp_hf.measure.benchmark import comparing, reporting

pytest_plugins = ("command_line",)

QUICK = ("--batch-sizes", "2", "--repeats", "2", "--new-tokens", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_profiled_turn(monkeypatch):
    """The profiler's bookkeeping takes longer than a small model."""
    monkeypatch.setattr(comparing, "PROFILED", 1)


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
    from architectures import LLAVA_NEXT

    monkeypatch.setattr(bench, "named_config", lambda name, preset: LLAVA_NEXT.compressed().config)
    output = tmp_path / "bench.json"
    arguments = ("--budgets", "0.1", "--image-size", "70x50", "--dtype", "bfloat16", "--cpu-time", "--json", output)
    code, out, err = run("bench", "--config", "tiny", *QUICK, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("tiny with random weights on cpu (")
    facts = json.loads(output.read_text())
    assert (facts["environment"]["dtype"], facts["settings"]["clock"]) == ("bfloat16", "CPU seconds")
    assert (facts["picture"], facts["seed"]) == ([70, 50], 0)


def test_selection(run, monkeypatch, tmp_path):
    small = dict(choosing.compare_choosing.__wrapped__.__kwdefaults__, patches=144, width=16, batch_sizes=(1, 2))
    monkeypatch.setattr(choosing.compare_choosing.__wrapped__, "__kwdefaults__", small)
    output = tmp_path / "selection.svg"
    code, out, err = run("bench", "--selection", "--repeats", "2", "--plot", output)
    assert (code, err) == (0, "")
    assert out.startswith("recover_tokens at (144, 16) on cpu (")
    assert "released code / ours" in out and "plain loop / ours" in out
    assert sum(line.startswith("  dynamic") for line in out.splitlines()) == 2
    assert "<svg" in output.read_text()


def test_scaling(run, monkeypatch, tmp_path):
    small = dict(scaling.measure_scaling.__wrapped__.__kwdefaults__, patches=36, width=8)
    small["axes"] = {"batch": (1, 2), "patches": (36, 49, 64, 81)}
    monkeypatch.setattr(scaling.measure_scaling.__wrapped__, "__kwdefaults__", small)
    # 64 tokens of 36 patches cannot be.
    monkeypatch.setitem(scaling.SCALED, "budget 64", scaling.SCALED["budget 64"].replace({"budget": 16}))
    monkeypatch.setitem(scaling.SCALED, "balanced", scaling.SCALED["balanced"].replace({"budget": 16}))
    output = tmp_path / "scaling.png"
    code, out, err = run("bench", "--scaling", "--repeats", "2", "--plot", output)
    assert (code, err) == (0, "")
    assert "patches: 36, 49, 64, 81; N log N would be 1.2" in out
    assert "merging: clustering the rest" in out
    assert output.stat().st_size > 10_000


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
        ([], "one of the arguments MODEL --config --selection --scaling is required"),
        (["demo", "--config", "mid"], "not allowed with argument"),
        (["demo", "--batch-sizes", "1,0"], "expected counts separated by commas as in 1,4,16, got '1,0'"),
        (["demo", "--budgets", "few"], "expected tokens, shares or dynamic"),
        (["demo", "--image-size", "640"], "expected width x height as in 640x480, got '640'"),
        (["demo", "--plot", "bench.txt"], "expected a file that ends in .png"),
        (["demo", "--preset", "paper"], "--preset goes with --config"),
        (["--config", "llava-2"], "Unknown configuration 'llava-2'; known ones are mid, llava-1.5-7b"),
        (["demo", "--budgets", "145", "--device", "cpu"], "an image has only 144 patches"),
        (["demo", "--repeats", "0", "--device", "cpu"], "rounds must be at least 1, got 0"),
        (["--selection", "--repeats", "0"], "rounds must be at least 1, got 0"),
        (["no/such/folder"], "no/such/folder is no folder"),
    ],
)
def test_errors_are_one_line(error, arguments, message):
    assert message in error("bench", *arguments)


def test_the_largest_batch_is_refused_without_a_gpu(error):
    message = error("bench", "demo", *QUICK, "--budgets", "16", "--largest-batch")
    assert "searched for on a GPU" in message
