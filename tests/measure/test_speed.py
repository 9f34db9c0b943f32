"""The table of speeds: its contenders answer alike, what is left out is said, and the command writes it."""

import contextlib
import functools
import gc
import itertools
import json
import weakref

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from demo_model import demo_model
from noise import noise_inputs
from tape import TapeRecorder

from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.core import kernels
from reccomp_hf.core.graphs import GraphCache
from reccomp_hf.measure.benchmark import Case, Part, choices, contenders, counting, speed, speed_markdown, speed_report
from reccomp_hf.measure.benchmark.published_speed import gpu_parts
from reccomp_hf.measure.benchmark.speed import OURS_GRAPHED, RATIOS, STATIC

pytest_plugins = ("command_line",)

FIELDS = {"budget": 16}


@pytest.fixture
def graphs(monkeypatch):
    """Recordings by the recorder for CPUs, where a GPU has CUDA graphs."""
    made = []

    def cache(device):
        made.append(GraphCache(recorder=TapeRecorder()))
        return made[-1]

    monkeypatch.setattr(speed, "new_graphs", cache)
    return made


def case_of(architecture, builds=None):
    def build():
        if builds is not None:
            builds.append(architecture.name)
        model = architecture.build()
        return model, functools.partial(noise_inputs, model)

    return Case(architecture.name, "paper", build, FIELDS)


def report(parts, **options):
    return speed_report(parts, torch.device("cpu"), torch.float32, progress=False, **options)


@each_architecture
def test_prefills_of_every_contender_are_measured(architecture, graphs):
    case = case_of(architecture)
    facts = report([speed.prefills(case, size, rounds=2) for size in (1, 2)])
    assert json.loads(json.dumps(facts)) == facts and facts["left_out"] == facts["failed"] == []
    assert [row["batch_size"] for row in facts["prefills"]] == [1, 2]
    for row in facts["prefills"]:
        assert list(row["prefill"]) == ["stock", "ours", OURS_GRAPHED, "oracle", "oracle, CUDA graphs"]
        assert row["ratios"].keys() == {f"{one} / {other}" for one, other in RATIOS}
        assert all(len(spread["values"]) == 2 for spread in [*row["prefill"].values(), *row["ratios"].values()])
        assert row["graphs"] == 3  # front, oracle's tower, language model
        assert all(first["seconds"] > 0 for first in row["first_prefill"].values())
        assert row["failed"] == {} and row["refusals"] == [] and row["recorded_anew"] == 0
        assert 0 <= row["logits"] < 1e-3
    assert [len(cache) for cache in graphs] == [3, 3]


def test_answers_are_counted(graphs):
    case = case_of(LLAVA)
    facts = report([speed.answers(case, 1, 2), speed.answers(case, 2, 3, static=True)])
    first, second = facts["answers"]
    assert list(first["rates"]) == ["stock", "ours", OURS_GRAPHED]
    assert list(second["rates"]) == [f"{OURS_GRAPHED}, {STATIC}", f"stock, {STATIC}"]
    assert all(rate > 0 for row in facts["answers"] for rate in row["rates"].values())
    assert (second["batch_size"], second["new_tokens"], second["failed"]) == (2, 3, {})
    assert [cache.recorded for cache in graphs] == [2, 2]


def test_launches_of_every_contender_are_counted(graphs):
    (row,) = report([speed.launched(case_of(LLAVA), 1)])["launches"]
    assert 100 < row["launches"]["oracle"] < row["launches"]["ours"]
    assert list(row["launches"]) == list(speed.CONTENDERS)


def test_choices_are_timed_and_counted_with_kernels_and_without(monkeypatch):
    monkeypatch.setattr(choices, "PATCHES", 40)
    contexts = []

    @contextlib.contextmanager
    def without():
        with kernels.loops_only():
            contexts.append(kernels._LOOPS_ONLY.get())
            yield

    monkeypatch.setitem(choices.WAYS, choices.LOOPS, without)
    facts = report([choices.choices(lambda: (torch.zeros(1), None), 2, 6, rounds=2)])
    assert facts["failed"] == [] and json.loads(json.dumps(facts)) == facts
    assert [row["method"] for row in facts["choices"]] == [*choices.PRESETS, *choices.METHODS]
    for row in facts["choices"]:
        assert row["launches"][choices.KERNELS] == row["launches"][choices.LOOPS] > 30  # without a GPU
        assert list(row["choice"]) == [choices.KERNELS, choices.LOOPS] and row["failed"] == {}
        assert all(len(spread["values"]) == 2 and spread["median"] > 0 for spread in row["choice"].values())
    assert contexts == [True] * len(facts["choices"]) * 4 and not kernels._LOOPS_ONLY.get()
    assert "| scope | 6 | 2 |" in " ".join(speed_markdown(facts).split())


def test_choices_are_timed_as_graphs(monkeypatch):
    """On tape, and where one cannot be recorded."""
    tape = TapeRecorder()

    def record(computation, inputs):
        if computation.args[0].method == "scope":
            raise RuntimeError("this cannot be recorded")
        return tape(computation, inputs)

    monkeypatch.setattr(choices, "PATCHES", 40)
    monkeypatch.setattr(choices, "new_recorder", lambda device: record)
    facts = report([choices.choices(lambda: (torch.zeros(1), None), 2, 6, rounds=2)])
    graphed = {row["method"]: speed.GRAPHED in row["choice"] for row in facts["choices"]}
    assert graphed == {name: name != "scope" for name in (*choices.PRESETS, *choices.METHODS)}
    assert tape.replayed == 2 * tape.recorded == 2 * (len(graphed) - 1)
    assert "CUDA graphs of the choice by scope, batch 2: RuntimeError: this cannot be recorded" in speed_markdown(
        facts
    )


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
    found = speed.equal_answers(model, processor, FIELDS, 5, batch_size=3)
    assert found == {"questions": 5, "equal": 5, "refusals": []}
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
    facts = report([speed.prefills(case_of(LLAVA), size) for size in (1, 2)], seconds=-1)
    assert facts["prefills"] == []
    assert facts["left_out"] == [f"prefills of llava, paper, 16 tokens, batch {size}" for size in (1, 2)]
    assert "Left out for want of time: prefills of llava" in speed_markdown(facts)


def failing(title="a part", error="no\nluck"):
    def measure(model, inputs_of):
        raise ValueError(error)

    return Part("prefills", title, lambda: (None, None), measure)


def test_a_part_that_fails_leaves_a_line_and_the_others_run(graphs):
    written, parts = [], [failing(), speed.answers(case_of(LLAVA), 1, 1), failing("another")]
    facts = report(parts, write=lambda facts: written.append(json.dumps(facts)))
    assert facts["failed"] == ["a part: ValueError: no", "another: ValueError: no"]
    assert len(facts["answers"]) == 1 and len(written) == 3
    assert [len(json.loads(line)["answers"]) for line in written] == [0, 1, 1]
    page = speed_markdown(json.loads(written[1]))
    assert "Failed: a part: ValueError: no." in page and "## Whole answers" in page and "## Prefills" not in page


def test_a_model_that_cannot_be_built_costs_its_own_parts():
    def build():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    case = Case("large", "paper", build, FIELDS)
    facts = report([speed.answers(case, 1, 1), speed.answers(case_of(LLAVA), 1, 1)])
    assert facts["failed"][0].endswith("OutOfMemoryError: CUDA out of memory. Tried to allocate")
    assert len(facts["answers"]) == 1


def test_successive_parts_share_a_model_and_one_lives_at_a_time():
    builds, alive = [], []

    def seen(model, inputs_of):
        gc.collect()
        alive.append(weakref.ref(model))
        assert sum(one() is not None for one in set(alive)) == 1
        return []

    one, other = case_of(LLAVA, builds), case_of(LLAVA_NEXT, builds)
    facts = report([Part("prefills", "part", case.build, seen) for case in (one, one, other, one)])
    assert facts["failed"] == [] and builds == ["llava", "llava_next", "llava"]


def test_a_contender_without_memory_leaves_a_dash(monkeypatch):
    stock = contenders.Contender.prefill

    def prefill(self):
        if self.attention_mask.shape[1] > 100:
            raise torch.cuda.OutOfMemoryError("no")
        return stock(self)

    monkeypatch.setattr(contenders.Contender, "prefill", prefill)
    facts = report([speed.prefills(case_of(LLAVA), 2, rounds=1)])
    (row,) = facts["prefills"]
    assert row["failed"] == {"stock": "OutOfMemoryError: no"} and row["ratios"]["stock / ours"] is None
    assert row["ratios"]["ours / oracle"]["median"] > 0
    page = speed_markdown(facts)
    line = next(line for line in page.splitlines() if line.startswith("| llava"))
    assert [cell.strip() for cell in line.split("|")][2:5] == [
        "2",
        "-",
        f"{row['prefill']['ours']['median'] * 1e3:,.2f}",
    ]
    assert "Failed: stock of llava, paper, 16 tokens, batch 2: OutOfMemoryError: no." in page


def test_what_ran_without_a_graph_is_said(monkeypatch):
    monkeypatch.setattr(speed, "new_graphs", lambda device: GraphCache())  # of CUDA, on a CPU
    facts = report([speed.prefills(case_of(LLAVA), 1, rounds=1)])
    assert facts["prefills"][0]["graphs"] == 0
    page = speed_markdown(facts)
    assert "Without a CUDA graph ran the front: inputs are on cpu." in page


def test_the_published_parts_fit_the_models():
    parts = gpu_parts(failing("equal answers"), torch.device("meta"), torch.bfloat16)
    titles = [part.title for part in parts]
    assert titles[0] == "prefills of LLaVA-1.5-7B, balanced, 64 tokens, batch 1" and len({*titles}) == len(titles)
    for wanted in (
        "batch 32",
        "LLaVA-NeXT-7B",
        "LLaVA-1.5-13B",
        "answers of 8",
        "answers of 128",
        "static",
        "largest",
    ):
        assert any(wanted in title for title in titles), wanted
    models = [part.build for part in parts]
    changes = sum(one is not other for one, other in itertools.pairwise(models))
    assert changes == 4  # 7B, the demo, NeXT, 13B, 7B
    for preset in ("paper", "balanced"):
        LLAVA.build().config.token_recovery.replace(
            {**TokenRecoveryConfig.from_preset(preset).overridable(), "budget": 16}
        ).validate()


def test_launches_are_counted():
    def work():
        return torch.zeros(3).add(1).sum()

    assert counting.launches(work, torch.device("cpu")) == 3


def test_the_command_writes_a_page(run, tmp_path):
    folder = tmp_path / "speeds"
    code, out, err = run("bench", "--report", folder, "--device", "cpu")
    titles = [line.split(" ", 1)[1] for line in err.splitlines()]
    assert code == 0 and titles[0] == "prefills of demo, balanced, 16 tokens, batch 1"
    assert len({*titles}) == len(titles) > 8
    page = (folder / "speed.md").read_text(encoding="utf-8")
    facts = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    assert out.startswith(page) and out.endswith(f"Wrote {folder / 'speed.md'} and {folder / 'speed.json'}.\n")
    assert page.startswith("# Speed\n") and page.count("demo, balanced, 16 tokens") == 2 + 2 + 5 + 1
    assert "There was no GPU: CUDA graphs were not recorded, and those columns ran eagerly." in page
    assert facts["equal_answers"] == [{"questions": 4, "equal": 4, "refusals": []}]
    assert facts["failed"] == facts["left_out"] == []


def test_a_report_measures_no_model_of_its_own(error, tmp_path):
    assert "not allowed with argument" in error("bench", "demo", "--report", tmp_path)


def test_prefills_of_a_comparison_may_be_graphs(run, tmp_path):
    file = tmp_path / "bench.json"
    common = ("--budgets", "16", "--batch-sizes", "1", "--repeats", "1", "--new-tokens", "1", "--device", "cpu")
    code, out, _ = run("bench", "demo", "--cuda-graph", *common, "--json", file)
    assert code == 0 and "prefills of ours and the oracle as CUDA graphs" in out
    assert json.loads(file.read_text())["settings"]["cuda_graph"] is True
