"""The choice of tokens, timed: the loops give what ours gives, exponents are found. No time is judged."""

import json
import sys

import pytest
import torch
from golden import GOLDEN, load

from reccomp_hf.core.choosing import recover_tokens
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.features import VisualFeatures
from reccomp_hf.core.methods.registry import get_method, method_names
from reccomp_hf.experiments.selection import choosing, loops, scaling
from reccomp_hf.experiments.selection.features import make_features, one_thread
from reccomp_hf.experiments.selection.plotting import plot_choosing, plot_scaling
from reccomp_hf.experiments.selection.published import PUBLISHED_LOOPS
from reccomp_hf.experiments.selection.reporting import choosing_text, scaling_text
from reccomp_hf.measure.benchmark.timing import Spread

SMALL = {"rounds": 2, "patches": 144, "width": 32, "progress": False}

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate values are leading to incorrect results:UserWarning")


# ---- the loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_loop_gives_what_the_released_code_gave(path):
    golden, _ = load(path)
    tokens = loops.released_loop(
        golden["hidden_states"][1:],
        golden["cls_query"],
        golden["keys"],
        golden["text_similarity"],
        TokenRecoveryConfig(method="authors"),
    )
    torch.testing.assert_close(tokens, golden["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loop", choosing.LOOPS)
def test_the_loops_give_our_tokens(loop):
    features, (run, same) = make_features(6, 256, 48, seed=3), choosing.LOOPS[loop]
    config = choosing.CHOICES[same]
    ours = recover_tokens(*features.arguments(), config)
    assert ours.visual_mask.any(-1).all() and ours.text_mask.any() and ours.centre_mask.any()
    for image, count in enumerate(ours.counts.tolist()):
        tokens = run(*(value[image] for value in features.arguments()), config)
        torch.testing.assert_close(tokens, ours.tokens[image, :count], rtol=1e-5, atol=1e-5)


def test_nothing_that_stands_out_leaves_one_centre():
    states, keys = torch.arange(30.0).view(30, 1).repeat(1, 4), torch.ones(31, 4)
    similarity = torch.linspace(0, 1, 30)
    tokens = loops.plain_loop(states, torch.ones(4), keys, similarity, TokenRecoveryConfig())
    torch.testing.assert_close(tokens, states.mean(0, keepdim=True))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    with pytest.raises(ImportError, match=r"pip install 'reccomp_hf\[test\]'"):
        choosing.compare_choosing(**SMALL)


# ---- comparing -----------------------------------------------------------------------------------------------------


def test_rows_of_settings_and_batch_sizes():
    threads = torch.get_num_threads()
    found = choosing.compare_choosing(batch_sizes=(1, 3), seed=1, **SMALL)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(found)) == found
    assert [(row["setting"], row["batch_size"]) for row in found["rows"]] == [
        (setting, size) for setting in choosing.CHOICES for size in (1, 3)
    ]
    assert found["environment"]["threads"] == 1
    tokens = {row["setting"]: row["tokens"] for row in found["rows"]}
    assert tokens["budget 64"] == tokens["balanced"] == 64
    ours = recover_tokens(*make_features(3, 144, 32, seed=1).arguments(), TokenRecoveryConfig())
    assert tokens["dynamic"] == pytest.approx(ours.counts.float().mean().item())
    for row in found["rows"]:
        for loop, ratio in row["ratios"].items():  # of the same round
            loops_seconds = found["loops"][loop]["seconds_per_image"]["values"]
            own = row["seconds_per_image"]["values"]
            assert ratio["values"] == pytest.approx([one / two for one, two in zip(loops_seconds, own, strict=True)])
    assert all(entry["difference"] < 1e-5 for entry in found["loops"].values())
    timed = {row["method"]: row for row in found["methods"]}
    assert timed.keys() == {"balanced", *(name for name in method_names() if get_method(name).budget != "none")}
    assert {name: row["tokens"] for name, row in timed.items()} == dict.fromkeys(timed, 64)  # 8 x 8 cells of 12 x 12
    for row in timed.values():
        assert len(row["choosing"]["values"]) == SMALL["rounds"]
        assert all(one < all_ for one, all_ in zip(row["choosing"]["values"], row["all"]["values"], strict=True))
        assert row["batch_size"] == SMALL["rounds"]  # no more images are drawn
        assert len(row["batch"]["values"]) == SMALL["rounds"]
    assert {name for name, row in timed.items() if "loop" in row} == PUBLISHED_LOOPS.keys()
    assert all(len(timed[name]["loop"]["values"]) == SMALL["rounds"] for name in PUBLISHED_LOOPS)


def test_a_published_loop_that_chooses_other_patches_is_not_timed(monkeypatch):
    monkeypatch.setitem(PUBLISHED_LOOPS, "divprune", lambda features, budget: torch.arange(budget))
    with pytest.raises(RuntimeError, match="published loop of 'divprune' chooses other patches"):
        choosing.compare_choosing(batch_sizes=(1,), **SMALL)


@pytest.mark.parametrize("method", PUBLISHED_LOOPS)
def test_published_loops_choose_our_patches(method):
    features, projected = (
        make_features(3, 256, 48, seed=3),
        torch.randn(3, 256, 300, generator=torch.Generator().manual_seed(0)),
    )
    config = TokenRecoveryConfig(method=method, budget=40)
    ours = recover_tokens(*features.arguments(), config, num_heads=4, projected=projected)
    for image in range(3):
        alone = slice(image, image + 1)
        of_image = VisualFeatures(*features[alone].arguments(), num_heads=4, projected=projected[alone])
        found = PUBLISHED_LOOPS[method](of_image, 40)
        assert found.tolist() == ours.places[image].tolist()


def test_seconds_are_per_image():
    class Watch:
        def time(self, work):
            return 6.0, work()

    seen = []
    features = make_features(5, 16, 4)
    turn = choosing._Turn(features, 3, Watch(), lambda batch: seen.append(batch.class_query))
    assert [turn()["seconds"] for _ in range(4)] == [2.0] * 4
    starts = [next(i for i in range(3) if torch.equal(rows, features.class_query[i : i + 3])) for rows in seen]
    assert starts == [0, 1, 2, 0]  # other images every time


def test_a_loop_that_gives_other_tokens_is_not_timed(monkeypatch):
    monkeypatch.setitem(choosing.LOOPS, "plain loop", (lambda *arguments: loops.plain_loop(*arguments) + 1, "dynamic"))
    with pytest.raises(RuntimeError, match="setting 'dynamic' give different tokens"):
        choosing.compare_choosing(**SMALL)


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- how cost grows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_known_exponent_is_found(power):
    sizes = [144, 324, 576, 1296, 4096]
    assert scaling.exponent(sizes, [3e-6 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_exponents_are_of_least_squares():
    # By hand: logarithms 0, 1, 2 against 0, 3, 3, all of base 2; the slope is 3 / 2.
    assert scaling.exponent([1, 2, 4], [1, 8, 8]) == pytest.approx(1.5)
    assert 1.1 < scaling.n_log_n([144, 576, 4096]) < 1.2
    for sizes, seconds in (([8], [1.0]), ([1, 2], [1.0, 0.0])):
        with pytest.raises(ValueError, match="two sizes or more and positive times"):
            scaling.exponent(sizes, seconds)


def test_what_every_call_costs_hides_growth_in_small_sizes():
    sizes = [1, 2, 4, 8, 1024, 2048]
    found = scaling._growth(sizes, [Spread((100.0 + size,)) for size in sizes])
    assert found["exponent"] < found["upper_exponent"] < 1
    assert scaling._growth([1, 2], [Spread((1.0,)), Spread((2.0,))])["upper_exponent"] is None


def test_axes_are_measured_step_by_step():
    axes = {"batch": (1, 2, 4), "tiles": (1, 3), "patches": (144, 256)}
    found = scaling.measure_scaling(axes=axes, rounds=2, width=16, patches=144, progress=False)
    assert json.loads(json.dumps(found)) == found
    assert {axis: entry["sizes"] for axis, entry in found["axes"].items()} == {a: [*s] for a, s in axes.items()}
    assert found["axes"]["patches"]["n_log_n"] > 1 and found["axes"]["batch"]["n_log_n"] is None
    for entry in found["axes"].values():
        assert entry["settings"].keys() == scaling.SCALED.keys()
        for steps in entry["settings"].values():
            assert steps.keys() == scaling.STEPS.keys()
            for whole, choosing_, merging in zip(
                *(steps[step]["seconds"] for step in ("all", "choosing", "merging")), strict=True
            ):
                parts = [a + b for a, b in zip(choosing_["values"], merging["values"], strict=True)]
                assert whole["values"] == pytest.approx(parts)


@pytest.mark.parametrize(("axis", "shape"), [("batch", (3, 144)), ("tiles", (3, 144)), ("patches", (1, 196))])
def test_what_grows(axis, shape, monkeypatch):
    seen = []
    original = scaling.VisualFeatures
    monkeypatch.setattr(
        scaling, "VisualFeatures", lambda *a, **k: seen.append((a[0].shape[:2], k["tiles"])) or original(*a, **k)
    )
    size = 196 if axis == "patches" else 3
    scaling._turn(axis, size, TokenRecoveryConfig(), 144, 8, 0, scaling.Stopwatch(torch.device("cpu")))()
    assert seen == [(shape, [3] if axis == "tiles" else [1] * shape[0])]


# ---- texts and plots -----------------------------------------------------------------------------------------------


def test_the_choice_for_a_reader(tmp_path):
    facts = choosing.compare_choosing(batch_sizes=(1, 2), **{**SMALL, "width": 16})
    text = choosing_text(facts)
    assert text.startswith("recover_tokens at (144, 16) on cpu (")
    assert "released code / ours" in text and "plain loop / ours" in text
    assert sum(line.startswith("  dynamic") for line in text.splitlines()) == 2
    assert "it gives the tokens of setting authors." in text and "  budget 64, batch 1" in text
    assert "published loop" in text and "batch 2, per image" in text
    plot_choosing(facts).savefig(tmp_path / "choosing.svg")
    assert "<svg" in (tmp_path / "choosing.svg").read_text()


def test_growth_for_a_reader(monkeypatch, tmp_path):
    # 64 tokens of 36 patches cannot be.
    monkeypatch.setitem(scaling.SCALED, "budget 64", scaling.SCALED["budget 64"].replace({"budget": 16}))
    monkeypatch.setitem(scaling.SCALED, "balanced", scaling.SCALED["balanced"].replace({"budget": 16}))
    axes = {"batch": (1, 2), "patches": (36, 49, 64, 81)}
    facts = scaling.measure_scaling(axes=axes, rounds=2, patches=36, width=8, progress=False)
    text = scaling_text(facts)
    assert "patches: 36, 49, 64, 81; N log N would be 1.2" in text
    assert "merging: clustering the rest" in text
    plot_scaling(facts).savefig(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize("measure", [choosing.compare_choosing, scaling.measure_scaling])
def test_no_rounds_are_refused(measure):
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure(rounds=0)
