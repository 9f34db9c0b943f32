"""The recorder of CUDA graphs on a GPU that is not there: pools, streams, workspaces, failures."""

import gc

import pytest
import torch
from fake_cuda import FakeCuda

from reccomp_hf.core.graphs import WARM_UPS, CudaRecorder


@pytest.fixture
def cuda():
    with FakeCuda().installed() as fake:
        yield fake


def record(recorder, computation=lambda tensors: tensors):
    return recorder(computation, {"values": torch.ones(2)})


def captures(cuda):
    return [line for line in cuda.log if line.startswith("capture")]


def test_recordings_share_a_pool_and_a_stream(cuda):
    recorder = CudaRecorder()
    kept = [record(recorder) for _ in range(3)]
    assert captures(cuda) == ["capture in pool 0"] * 3 and len(kept) == 3
    assert len(cuda.streams) == 1 and cuda.current not in cuda.streams
    assert cuda.streams[0].waited == [cuda.current] * 3 and cuda.current.waited == cuda.streams * 3


def test_a_pool_without_recordings_is_not_used_again(cuda):
    """Torch refuses it; without the rule the fourth call would fail, and its shape would never be recorded."""
    recorder = CudaRecorder()
    kept = [record(recorder), record(recorder)]
    kept.pop()
    kept.append(record(recorder))
    kept.clear()
    gc.collect()
    kept.append(record(recorder))
    assert captures(cuda) == ["capture in pool 0"] * 3 + ["capture in pool 1"]


def test_the_pool_without_the_rule_is_refused(cuda):
    recorder = CudaRecorder()
    record(recorder)
    gc.collect()
    recorder._graphs = [None]  # as if a graph were left
    with pytest.raises(RuntimeError, match="use_count > 0"):
        record(recorder)


def test_workspaces_of_matrix_products_lie_in_the_pool(cuda):
    """They are freed between the warm-up, which makes some, and the capture; and after it."""
    ran = []

    def computation(tensors):
        cuda.log.append("run")
        ran.append(cuda.current)
        return tensors

    replay, _ = record(CudaRecorder(), computation)
    freed = "workspaces freed"
    assert cuda.log == ["run"] * WARM_UPS + [freed, "capture in pool 0", "run", freed]
    assert ran == [cuda.streams[0]] * (WARM_UPS + 1)
    replay()
    assert cuda.log[-1] == "replay"


@pytest.mark.parametrize("fails_at_the_end", [False, True])
def test_a_capture_that_fails_leaves_neither_its_stream_nor_its_pool(cuda, fails_at_the_end):
    recorder, before, runs = CudaRecorder(), cuda.current, []
    kept = record(recorder)

    def computation(tensors):
        runs.append(1)
        if len(runs) > WARM_UPS and not fails_at_the_end:
            raise RuntimeError("a read")
        return tensors

    cuda.fails = fails_at_the_end
    with pytest.raises(RuntimeError, match=r"previous error|not permitted"):
        record(recorder, computation)
    assert cuda.current is before and kept
    cuda.fails = False
    kept = [kept, record(recorder), record(recorder)]
    assert captures(cuda) == ["capture in pool 0"] * 2 + ["capture in pool 1"] * 2


def test_turns_wait_for_each_other(cuda):
    recorder, first = CudaRecorder(), cuda.current
    with recorder.turn(torch.device("cpu")):
        pass
    cuda.current = second = type(first)()
    with recorder.turn(torch.device("cpu")):
        assert second.waited == [("event", first)]


def test_torch_lets_graphs_be_held_weakly():
    """The recorder counts the graphs that live, by weak references to torch's own class."""
    assert torch.cuda.CUDAGraph.__weakrefoffset__ > 0 and torch.cuda.CUDAGraph.__hash__ is not None
