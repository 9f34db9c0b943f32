"""The cache of CUDA graphs alone: what a recording belongs to, which one is dropped, and what is tried once."""

import logging

import torch
from tape import TapeRecorder

from reccomp_hf.core.graphs import GraphCache


def doubled(tensors):
    return {"values": 2 * tensors["values"]}


def run(cache, rows, key=()):
    with torch.no_grad():
        return cache.run("test", [], key, doubled, {"values": torch.ones(rows)})


def test_a_recording_belongs_to_key_shape_and_type():
    cache = GraphCache(recorder=TapeRecorder())
    for _ in range(2):
        run(cache, 1), run(cache, 2), run(cache, 2, ("other",))
    with torch.no_grad():
        halves = cache.run("test", [], (), doubled, {"values": torch.ones(2, dtype=torch.bfloat16)})
    assert halves["values"].dtype == torch.bfloat16
    assert (len(cache), cache.recorder.recorded, cache.recorder.replayed) == (4, 4, 7)


def test_the_least_recently_used_recording_is_dropped():
    cache = GraphCache(limit=2, recorder=TapeRecorder())
    for rows in (1, 2, 1, 3):  # 2 is dropped for 3
        assert run(cache, rows)["values"].tolist() == [2.0] * rows
    assert (len(cache), cache.recorder.recorded) == (2, 3)
    run(cache, 1)
    assert cache.recorder.recorded == 3
    run(cache, 2)
    assert cache.recorder.recorded == 4


def test_what_cannot_be_recorded_is_tried_once(caplog):
    class Failing(TapeRecorder):
        def __call__(self, computation, inputs):
            self.recorded += 1
            raise RuntimeError("no memory\nleft")

    cache = GraphCache(recorder=Failing())
    with caplog.at_level(logging.WARNING):
        assert run(cache, 1) is run(cache, 1) is None
    assert cache.recorder.recorded == 1
    assert caplog.text.count("The test runs without a CUDA graph: it cannot be recorded: no memory left.") == 1
