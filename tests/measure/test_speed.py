"""The table of speeds: its contenders answer alike, what is left out is said, and the command writes it."""

import functools
import json

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from demo_model import demo_model
from noise import noise_inputs
from tape import TapeRecorder

from reccomp_hf.core.graphs import GraphCache
from reccomp_hf.measure.benchmark import Case, contenders, counting, speed, speed_markdown, speed_report
from reccomp_hf.measure.benchmark.speed import OURS_GRAPHED, RATIOS, STATIC, published_cases

pytest_plugins = ("command_line",)

FIELDS = {"budget": 16}


@pytest.fixture
def graphs(monkeypatch):
    """Recordings by the recorder for CPUs, where a GPU has CUDA graphs."""
    made = []

    def cache(device):
        made.append(GraphCache(recorder=TapeRecorder()))
        return made[-1]

    monkeypatch.setattr(speed, "_graphs", cache)
    return made


def case_of(architecture, sizes=(1, 2), answers=(1,), static=(1,)):
    model = architecture.build()
    build = functools.partial(tuple, (model, functools.partial(noise_inputs, model)))
    return Case(architecture.name, "paper", build, FIELDS, sizes, answers, static)


@each_architecture
def test_every_contender_is_measured(architecture, graphs):
    facts = speed_report([case_of(architecture)], new_tokens=(1, 2), rounds=2, progress=False)
    assert json.loads(json.dumps(facts)) == facts and facts["left_out"] == []
    first, second = facts["rows"]
    assert [row["batch_size"] for row in facts["rows"]] == [1, 2]
    for row in facts["rows"]:
        assert list(row["prefill"]) == ["stock", "ours", OURS_GRAPHED, "oracle", "oracle, CUDA graphs"]
        assert row["ratios"].keys() == {f"{one} / {other}" for one, other in RATIOS}
        assert all(len(spread["values"]) == 2 for spread in [*row["prefill"].values(), *row["ratios"].values()])
        assert row["graphs"] == 3  # front, oracle's tower, language model
        assert all(first["seconds"] > 0 for first in row["first_prefill"].values())
        assert row["prefill"]["oracle"]["launches"] < row["prefill"]["ours"]["launches"]
    ways = ["stock", "ours", OURS_GRAPHED, f"stock, {STATIC}", f"{OURS_GRAPHED}, {STATIC}"]
    assert {count: list(found) for count, found in first["answers"].items()} == {"1": ways, "2": ways}
    assert all(speed > 0 for found in first["answers"].values() for speed in found.values())
    assert second["answers"] == {}
    assert [len(cache) for cache in graphs] == [3, 3]


@torch.no_grad()
@pytest.mark.parametrize("architecture", [LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
def test_contenders_with_recordings_answer_alike(architecture):
    model = architecture.build()
    inputs, cache = noise_inputs(model, 2), GraphCache(recorder=TapeRecorder())
    for make in (contenders.ours, contenders.oracle):
        eager, recorded = make(model, inputs, FIELDS), make(model, inputs, FIELDS, cache)
        wanted = eager.decode(eager.prefill(), 4)
        for _ in range(2):
            assert recorded.decode(recorded.prefill(), 4).equal(wanted)
    assert len(cache) == 3 and model._graphs is None


def test_recordings_are_exchanged_and_put_back():
    model, own, other = LLAVA.build(), GraphCache(), GraphCache()
    model._graphs = own
    with pytest.raises(KeyError), contenders.recordings(model, other):
        assert model._graphs is other
        raise KeyError
    assert model._graphs is own


def test_answers_are_compared(graphs, monkeypatch):
    model, processor = demo_model()
    assert speed.equal_answers(model, processor, FIELDS, 5, batch_size=3) == {"questions": 5, "equal": 5}
    stock = contenders.recordings

    def other_weights(model, given):
        if given is not None:
            model.lm_head.weight.data.neg_()
        return stock(model, given)

    before = model.lm_head.weight.data.clone()
    monkeypatch.setattr(speed, "recordings", other_weights)
    try:
        assert speed.equal_answers(model, processor, FIELDS, 3)["equal"] == 0
    finally:
        model.lm_head.weight.data.copy_(before)


def test_what_there_is_no_time_for_is_left_out_and_named():
    facts = speed_report([case_of(LLAVA)], new_tokens=(1,), rounds=1, seconds=-1, progress=False)
    assert facts["rows"] == [] and facts["left_out"] == [f"llava, paper, 16 tokens, batch {size}" for size in (1, 2)]


def test_a_contender_without_memory_leaves_a_dash(monkeypatch):
    stock = contenders.Contender.prefill

    def prefill(self):
        if self.attention_mask.shape[1] > 100:
            raise torch.cuda.OutOfMemoryError("no")
        return stock(self)

    monkeypatch.setattr(contenders.Contender, "prefill", prefill)
    facts = speed_report([case_of(LLAVA, (2,), (), ())], new_tokens=(1,), rounds=1, progress=False)
    (row,) = facts["rows"]
    assert "stock" not in row["prefill"] and row["ratios"]["stock / ours"] is None
    assert row["ratios"]["ours / oracle"]["median"] > 0
    line = next(line for line in speed_markdown(facts).splitlines() if line.startswith("| llava"))
    assert [cell.strip() for cell in line.split("|")][2:5] == [
        "2",
        "-",
        f"{row['prefill']['ours']['median'] * 1e3:,.2f}",
    ]


def test_the_published_cases_fit_the_models():
    cases = published_cases(torch.device("meta"), torch.bfloat16)
    assert [case.title for case in cases] == [
        "LLaVA-1.5-7B, balanced, 64 tokens",
        "LLaVA-1.5-7B, paper, 64 tokens",
        "LLaVA-NeXT-7B, balanced, 160 tokens",
        "LLaVA-1.5-13B, balanced, 64 tokens",
    ]
    assert cases[0].build is cases[1].build is not cases[2].build
    for case in cases:
        assert {*case.static} <= {*case.answers} <= {*case.batch_sizes}
        LLAVA.build().config.token_recovery.replace(dict(case.fields)).validate()


def test_launches_are_counted():
    def work():
        return torch.zeros(3).add(1).sum()

    assert counting.launches(work, torch.device("cpu")) == 3


def test_the_command_writes_a_page(run, tmp_path):
    folder = tmp_path / "speeds"
    code, out, err = run("bench", "--report", folder, "--device", "cpu")
    assert (code, err) == (0, "")
    page = (folder / "speed.md").read_text(encoding="utf-8")
    facts = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    assert out.startswith(page) and out.endswith(f"Wrote {folder / 'speed.md'} and {folder / 'speed.json'}.\n")
    assert page.startswith("# Speed\n") and page.count("demo, balanced, 16 tokens") == 2 + 2 + 4
    assert "There was no GPU: CUDA graphs were not recorded, and those columns ran eagerly." in page
    assert facts["equal_answers"] == {"questions": 4, "equal": 4}


def test_a_report_measures_no_model_of_its_own(error, tmp_path):
    assert "not allowed with argument" in error("bench", "demo", "--report", tmp_path)


def test_prefills_of_a_comparison_may_be_graphs(run, tmp_path):
    file = tmp_path / "bench.json"
    common = ("--budgets", "16", "--batch-sizes", "1", "--repeats", "1", "--new-tokens", "1", "--device", "cpu")
    code, out, _ = run("bench", "demo", "--cuda-graph", *common, "--json", file)
    assert code == 0 and "prefills of ours and the oracle as CUDA graphs" in out
    assert json.loads(file.read_text())["settings"]["cuda_graph"] is True
