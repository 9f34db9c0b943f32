"""Triton kernels choose as their loops do, in Triton's interpreter, and compile for GPUs, which need not be there.

`TRITON_INTERPRET=1 pytest -m triton` runs the kernels on the CPU; without the variable they are compiled.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from greedy_loops import CHOICES, LOOPS
from method_cases import check, draw
from test_greedy import COUNTS, PATCHES, chosen, herd, herding_oracle, volume_oracle, widen
from test_methods_ties import tied

from reccomp_hf import TokenRecoveryConfig, VisualFeatures
from reccomp_hf.core import greedy, kernels
from reccomp_hf.core.methods.registry import get_method

pytestmark = pytest.mark.triton
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")
each_kernel = pytest.mark.parametrize("name", LOOPS)
each_choice = pytest.mark.parametrize(("used", "fields"), CHOICES.values(), ids=CHOICES)
GREEDY = pytest.mark.parametrize("method", ["divprune", "cdpruner", "scope", "vispruner", "mmtok"])


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels are used on the CPU; the names of those that were."""
    names, launch = [], kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda name, *given, **others: names.append(name) or launch(name, *given, **others)
    )
    monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_USABLE", {})
    return names


@interpreted
@each_kernel
def test_kernels_agree_with_their_loops_on_the_problems_that_check_them(name, on_cpu):
    problem = kernels._PROBLEMS[name]()
    LOOPS[name](*problem)
    assert list(kernels._USABLE.values()) == [True]
    assert on_cpu == [name.removesuffix("_rows")] * 2


def features(valid, seed, patches=48, width=60, dtype=torch.float32, spoil=None):
    """Random features of three images, some patches of which may be missing."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, patches, width), (3, width), (3, patches + 1, width), (3, patches), (3, patches, width + 4)]
    values = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    for place, value in spoil or ():
        for tensor in (values[0], values[4]):
            tensor[0, place] = value
    exists = torch.rand(3, patches, generator=generator) < 0.7 if valid else None
    words = torch.rand(3, 5, patches, generator=generator) * 2 - 1
    words[0, 3:] = words[2, 4:] = -torch.inf  # padding
    return VisualFeatures(*values[:4], num_heads=2, valid=exists, projected=values[4], word_similarity=words)


def choose(settings, given):
    selection = get_method(settings.method).select(given, settings)
    return torch.stack([selection.visual_mask, selection.text_mask, selection.coverage_mask])


SPOILT = {
    "nothing": None,
    "equal patches": [(slice(3, 9), 1.0)],
    "zeros": [(slice(0, 40), 0.0)],
    "nan": [(7, float("nan"))],
    "infinity": [(7, float("inf"))],
}


@interpreted
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("valid", [False, True], ids=["all patches", "some patches"])
@each_choice
def test_kernels_choose_as_the_loops(used, fields, valid, spoil, on_cpu, monkeypatch):
    settings = TokenRecoveryConfig(budget=13, **fields)
    for width in (24, 60):  # fewer dimensions than patches, and more
        given = features(valid, width, width=width, spoil=spoil)
        found = choose(settings, given)
        assert set(on_cpu) == set(used)
        monkeypatch.setattr(kernels, "_DEVICES", ("cuda",))
        assert found.equal(choose(settings, given))
        monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))


@interpreted
@each_choice
def test_kernels_choose_as_the_loops_among_many_tiles(used, fields, on_cpu, monkeypatch):
    """Longer vectors, of which programs read fewer rows at once."""
    monkeypatch.setattr(greedy, "_PRODUCTS_AT_ONCE", 10**9)  # tables, as on a GPU
    options = {"method_options": {"step": 300}} if fields.get("method") == "vispruner" else {}
    given, settings = features(True, 5, patches=1296), TokenRecoveryConfig(budget=5, **fields, **options)
    found = choose(settings, given)
    assert set(on_cpu) == set(used)
    monkeypatch.setattr(kernels, "_DEVICES", ("cuda",))
    assert found.equal(choose(settings, given))


@interpreted
@GREEDY
@pytest.mark.parametrize("n", [2, 17, 36])
def test_kernels_choose_as_the_plain_loops(method, n, on_cpu):
    for budget in {1, max(1, n // 3), n}:
        check(method, draw(n), budget=budget)
    check(method, draw(n, batch=2, seed=2), budget=0.4, valid=torch.rand(2, n) < 2)
    assert on_cpu


@interpreted
@GREEDY
@pytest.mark.parametrize("n", [5, 16])
def test_ties_go_to_the_lower_raster_index(method, n, on_cpu):
    case, projected = tied(n, 0)
    for budget in (1, 3, n - 2):
        check(method, (case, projected), budget=budget)
    assert on_cpu


@interpreted
@pytest.mark.parametrize(
    ("loop", "oracle"), [(herd, herding_oracle), (widen, volume_oracle)], ids=["herding", "volume"]
)
def test_both_shared_loops_choose_as_the_plain_loop(loop, oracle, on_cpu):
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(5, PATCHES, 40, generator=generator), torch.rand(5, PATCHES, generator=generator)
    candidates = torch.rand(5, PATCHES, generator=generator) < 0.8
    for row, found in enumerate(chosen(loop(*drawn, candidates))):
        arrays = [values[row].double().numpy() for values in drawn]
        assert found == sorted(oracle(*arrays, np.flatnonzero(candidates[row].numpy()).tolist(), int(COUNTS[row])))
    assert on_cpu


# ---- compiled ------------------------------------------------------------------------------------------------------

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64", torch.int8: "i8", torch.bool: "i1"}


def compilable(name, problem, monkeypatch):
    """Source and options of a kernel as it would be launched for a problem."""
    from triton.compiler import ASTSource

    from reccomp_hf.core.kernels_triton import KERNELS

    taken = {}

    def take(name, chosen, *arguments, warps, **constants):
        fixed = {key: value for key, value in constants.items() if key.isupper()}
        numbers = {key: value for key, value in constants.items() if key not in fixed}
        names = [key for key in KERNELS[name].arg_names if key not in constants]
        values = dict(zip(names, [*arguments, chosen, chosen.shape[-1]], strict=True)) | numbers
        kinds = {key: f"*{TYPES[value.dtype]}" if hasattr(value, "dtype") else "i32" for key, value in values.items()}
        signature = {key: kinds.get(key, "constexpr") for key in KERNELS[name].arg_names}
        taken["source"] = ASTSource(fn=KERNELS[name], signature=signature, constexprs=fixed)
        taken["options"] = {"num_warps": warps, "num_stages": 1}
        return chosen

    monkeypatch.setattr(kernels, "_launch", take)
    kernels._KERNELS[name](*problem)
    return taken


PROBLEMS = {
    **{name: (name, problem) for name, problem in kernels._PROBLEMS.items()},
    "farthest of five tiles": (
        "farthest",
        lambda: (torch.zeros(1, 2880, dtype=torch.long), torch.ones(1, 2880) > 0, torch.ones(1).long(), (24, 24), 9),
    ),
    "diversity in float64": ("follow", lambda: _doubled("follow", add=False)),
    "coverage in float64": ("cover", lambda: _doubled("cover")),
    "herding of five tiles": ("follow", lambda: (*_tables(torch.float32, 3), *_CHOICE, 9, True)),
    "volume of five tiles": ("widen", lambda: (*_tables(torch.float64, 2), *_CHOICE, 9, 1e-9)),
    "coverage of five tiles": ("cover", lambda: (*_tables(torch.float32, 1), torch.ones(1, 2880), *_CHOICE, 9)),
    "likeness of five tiles": (
        "drop_alike",
        lambda: (*_tables(torch.float32, 1), torch.arange(2880)[None], *[torch.ones(1).long()] * 2, 8, []),
    ),
}
_CHOICE = torch.ones(1, 2880) > 0, torch.ones(1).long()
"""Candidates, and how many to choose."""


def _tables(dtype, count):
    """The table of a row of 2,880 patches, and vectors."""
    return torch.zeros(1, 2880, 2880, dtype=dtype), *[torch.zeros(1, 1, 2880, dtype=dtype)] * (count - 1)


def _doubled(name, **last):
    problem = kernels._PROBLEMS[name]()
    doubled = [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in problem
    ]
    return (*doubled[: len(doubled) - len(last)], *last.values())


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_kernels_compile_for_gpus(name, problem, capability, monkeypatch, tmp_path):
    """To machine code, and without waiting for memory of one step while the next one writes it."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    given = compilable(name, problem(), monkeypatch)
    code = triton.compile(given["source"], target=GPUTarget("cuda", capability, 32), options=given["options"]).asm
    assert len(code["cubin"]) > 1000
    assert "cp.async" not in code["ptx"]
    assert "bar.sync" in code["ptx"]


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_kernel
def test_kernels_choose_as_the_loops_on_a_gpu_and_in_its_graphs(name, monkeypatch):
    monkeypatch.setattr(kernels, "_USABLE", {})
    problem = [value.cuda() if isinstance(value, torch.Tensor) else value for value in kernels._PROBLEMS[name]()]
    wanted = LOOPS[name].__wrapped__(*problem)
    assert LOOPS[name](*problem).equal(wanted)
    assert list(kernels._USABLE.values()) == [True]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = LOOPS[name](*problem)
    graph.replay()
    assert found.equal(wanted)
