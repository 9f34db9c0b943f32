"""Decoding into a static cache, which transformers compiles on a GPU: the ids are a dynamic cache's."""

import copy

import pytest
import torch
from architectures import ROWS, each_architecture, each_side, generate
from tape import TapeRecorder
from transformers import CompileConfig

from reccomp_hf.core.graphs import GraphCache

SECTIONS = {
    "compact": {"budget": 16},
    "original": {"budget": 16, "position_ids": "original", "merged_tokens": 4},
    "dynamic": {"position_ids": "original"},
}
each_section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
STATIC = {"cache_implementation": "static", "new_tokens": 8}


@each_section
@each_side
@each_architecture
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["padded", "one"])
def test_ids_are_those_of_a_dynamic_cache(architecture, side, section, rows):
    model, batch = architecture.compressed(), architecture.encode(rows, side)
    wanted = generate(model, batch, new_tokens=8, token_recovery=section)
    found = generate(model, batch, **STATIC, token_recovery=section)
    assert found.equal(wanted)
    assert found.shape[1] > batch["input_ids"].shape[1] + 2


@each_section
@each_architecture
def test_ids_are_those_with_recordings(architecture, section):
    model, batch = copy.deepcopy(architecture.compressed()), architecture.encode(ROWS)
    wanted = generate(model, batch, new_tokens=8, token_recovery=section)
    model._graphs = GraphCache(recorder=TapeRecorder())
    for _ in range(2):
        assert generate(model, batch, **STATIC, token_recovery=section).equal(wanted)


@each_architecture
def test_the_step_compiles_to_one_graph(architecture):
    """Transformers' own compilation of the decoding step, which it leaves out on a CPU unless told to."""
    model, batch = copy.deepcopy(architecture.compressed()), architecture.encode(ROWS[:2])
    wanted = generate(model, batch, new_tokens=8, token_recovery=SECTIONS["original"])
    model._graphs = GraphCache(recorder=TapeRecorder())
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = generate(model, batch, **STATIC, token_recovery=SECTIONS["original"], compile_config=compile_config)
    assert found.equal(wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
