"""The recorder for CPUs shows what would be wrong on a GPU: planted faults."""

import pytest
import torch
from tape import TapeRecorder


def test_operators_that_read_or_copy_from_the_host_are_refused():
    recorder = TapeRecorder()
    values = {"values": torch.arange(4.0)}
    for computation in (
        lambda tensors: {"sum": tensors["values"] * tensors["values"].sum().item()},
        lambda tensors: {"some": tensors["values"][tensors["values"] > 1]},
        lambda tensors: {"sum": tensors["values"] + torch.tensor([1.0])},
    ):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            recorder(computation, values)


def test_a_recording_that_reads_freed_memory_shows():
    """A planted fault: a tensor made before the recorded part, which nothing keeps."""
    recorder, values = TapeRecorder(), {"values": torch.ones(3)}
    kept = [torch.arange(3.0)]
    replay, outputs = recorder(lambda tensors: {"sum": tensors["values"] + kept[0]}, values)
    replay()
    assert outputs["sum"].tolist() == [1, 2, 3]
    kept.clear()
    with pytest.raises(RuntimeError, match="memory that has been freed"):
        replay()


def test_a_tensor_of_a_recorded_part_that_is_used_later_shows():
    """A planted fault: what is made while a graph is recorded lies in the pool, where other graphs write."""
    recorder, values, kept = TapeRecorder(), {"values": torch.ones(3)}, []

    def computation(tensors):
        kept.append(tensors["values"] * 2)
        return {"sum": kept[-1] + 1}

    replay, outputs = recorder(computation, values)
    other, _ = recorder(lambda tensors: {"sum": tensors["values"] + 1}, values)
    replay()
    assert outputs["sum"].tolist() == [3, 3, 3] and kept[-1].tolist() == [2, 2, 2]
    other()
    assert kept[-1].isnan().all() and outputs["sum"].isnan().all()
