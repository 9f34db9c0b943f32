"""Kernels in place of greedy loops: what they leave to launch, and when the loops run; how they choose is tested with
Triton, in `test_kernels_triton.py`."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from greedy_loops import CHOICES, LOOPS
from test_greedy import operators

from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.core import greedy, kernels

each_kernel = pytest.mark.parametrize("name", LOOPS)
each_choice = pytest.mark.parametrize(("used", "fields"), CHOICES.values(), ids=CHOICES)


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """Kernels that were not used yet, and could be on a CPU."""
    monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_USABLE", {})
    monkeypatch.setattr(kernels, "_SAID", set())


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched; nothing runs."""
    names = []
    monkeypatch.setattr(kernels, "_launch", lambda name, chosen, *_, **__: names.append(name) or chosen)
    monkeypatch.setattr(kernels, "_is_usable", lambda *_: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # autocast has no device `meta`
    return names


@pytest.mark.parametrize("budget", [64, 128])
@each_choice
def test_a_choice_launches_few_kernels_whatever_its_budget(used, fields, budget, launched):
    others = operators(TokenRecoveryConfig(budget=budget, **fields), patches=576, width=1024)
    assert launched == used
    assert others + len(launched) <= 76


@each_choice
def test_a_choice_among_five_tiles_launches_as_few(used, fields, launched, monkeypatch):
    """2,880 patches; where the tables of a batch take too much memory, some images at a time."""
    config = TokenRecoveryConfig(budget=64, **fields)
    wanted = operators(config, patches=576, width=1024)
    launched.clear()
    assert operators(config, patches=2880, width=1024) <= wanted + 1  # more patches than dimensions: float64
    assert launched == used
    launched.clear()
    monkeypatch.setattr(greedy, "_TABLE_BYTES", 2 * 8 * 2880**2)
    assert operators(config, patches=2880, width=1024) <= 2 * wanted + 1
    assert launched == used * (1 if used in (["farthest"], ["drop_alike"]) else 2)  # of three images, two and one


@pytest.mark.parametrize("budget", [64, 128])
@pytest.mark.parametrize(("method", "most"), [("holov", 81), ("authors", 234)])
def test_choices_without_a_loop_launch_few_kernels(method, most, budget, launched):
    fields = {} if method == "authors" else {"budget": budget}
    assert operators(TokenRecoveryConfig(method=method, **fields), patches=576, width=1024) <= most
    assert launched == []


@pytest.mark.parametrize("budget", [64, 128])
def test_balanced_launches_two_kernels_and_finds_outliers(budget, launched):
    others = operators(TokenRecoveryConfig.from_preset("balanced", budget=budget), patches=576, width=1024)
    assert launched == ["widen", "follow"]
    assert others <= 162


def made_to(name, monkeypatch, choose):
    monkeypatch.setitem(kernels._KERNELS, name, choose)
    return kernels._PROBLEMS[name]()


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@each_kernel
def test_a_kernel_that_agrees_with_its_loop_is_used(name, monkeypatch, caplog):
    calls = []
    problem = made_to(name, monkeypatch, lambda *given: calls.append(given) or LOOPS[name].__wrapped__(*given))
    assert LOOPS[name](*problem).equal(LOOPS[name].__wrapped__(*problem))
    LOOPS[name](*problem)
    assert len(calls) == 3  # the first one checks
    assert not messages(caplog)


@each_kernel
def test_a_kernel_that_chooses_differently_is_not_used(name, monkeypatch, caplog):
    problem = made_to(name, monkeypatch, lambda *given: ~LOOPS[name].__wrapped__(*given))
    for _ in range(2):
        assert LOOPS[name](*problem).equal(LOOPS[name].__wrapped__(*problem))
    (message,) = messages(caplog)
    assert message.endswith(f"step by step, which is slower: kernel {name} chooses differently there")


def test_without_triton_the_loops_run_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "reccomp_hf.core.kernels_triton", raising=False)
    for name in ("farthest", "widen"):
        problem = kernels._PROBLEMS[name]()
        assert LOOPS[name](*problem).equal(LOOPS[name].__wrapped__(*problem))
    (message,) = messages(caplog)
    assert "on cpu without Triton" in message
    assert "pip install triton" in message


def test_nothing_is_tried_inside_a_capture(monkeypatch, caplog):
    problem = made_to("follow", monkeypatch, lambda *given: pytest.fail("tried"))
    monkeypatch.setattr(kernels, "_is_captured", lambda values: True)
    assert LOOPS["follow"](*problem).equal(LOOPS["follow"].__wrapped__(*problem))
    assert not kernels._USABLE
    assert not messages(caplog)


def test_traced_code_takes_the_loop(monkeypatch):
    problem = made_to("follow", monkeypatch, lambda *given: pytest.fail("tried"))
    torch._dynamo.reset()
    compiled = torch.compile(LOOPS["follow"], backend="eager", fullgraph=True)
    assert compiled(*problem).equal(LOOPS["follow"].__wrapped__(*problem))


def test_loops_run_where_only_they_are_wanted(monkeypatch):
    problem = made_to("follow", monkeypatch, lambda *given: pytest.fail("tried"))
    with kernels.loops_only():
        LOOPS["follow"](*problem)
    assert not kernels._USABLE


def test_other_devices_and_large_tables_take_the_loop(monkeypatch):
    made_to("follow", monkeypatch, lambda *given: pytest.fail("tried"))
    table, first, then, candidates, counts, steps, add = kernels._PROBLEMS["follow"]()
    monkeypatch.setattr(kernels, "LARGEST_TABLE", 63)
    LOOPS["follow"](table, first, then, candidates, counts, steps, add)
    monkeypatch.setattr(kernels, "LARGEST_TABLE", 64)
    LOOPS["follow"](table[:0], first[:0], then[:0], candidates[:0], counts[:0], steps, add)
    monkeypatch.setattr(kernels, "_DEVICES", ("cuda",))
    LOOPS["follow"](table, first, then, candidates, counts, steps, add)


def test_many_determinantal_picks_among_many_patches_take_the_loop(monkeypatch):
    """A program would read the rows of all earlier picks in every step."""
    problem = made_to("widen", monkeypatch, lambda *given: pytest.fail("tried"))
    monkeypatch.setattr(kernels, "_LARGEST_FACTOR", 64 * 27 - 1)
    assert LOOPS["widen"](*problem).any()
    assert not kernels._USABLE


@each_kernel
def test_problems_have_no_ties_and_choose_something(name):
    """A kernel that chose nothing, or everything, would not agree."""
    problem = kernels._PROBLEMS[name]()
    chosen = LOOPS[name].__wrapped__(*problem)
    assert chosen.sum(-1).tolist() == [0, 9, 18, 27]
