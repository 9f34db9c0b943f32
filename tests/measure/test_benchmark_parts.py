"""The benchmark's parts: timing, counting, the largest batch, models with random weights and their inputs."""

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT
from noise import PICTURE, noise_inputs

from reccomp_hf.measure.benchmark import capacity, counting, stages
from reccomp_hf.measure.benchmark.batches import noise_batch
from reccomp_hf.measure.benchmark.models import MID, named_config, random_model, sharpen
from reccomp_hf.measure.benchmark.timing import Spread, Stopwatch, interleave
from reccomp_hf.measure.cost import parameter_counts

CPU = torch.device("cpu")


# ---- timing --------------------------------------------------------------------------------------------------------


def test_turns_alternate():
    order = []

    def turn(name):
        return lambda: order.append(name) or {"seconds": len(order)}

    found = interleave({name: turn(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert found["c"]["seconds"].values == (3, 4, 9)
    with pytest.raises(ValueError, match="at least one round, got 0"):
        interleave({}, 0)


def test_spreads():
    spread = Spread((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (spread.low, spread.median, spread.high) == (2, 3, 4)
    assert spread.over(Spread((1.0, 1.0, 1.0, 2.0, 50.0))).values == (1, 2, 3, 2, 2)
    assert spread.scaled(2).median == 6
    with pytest.raises(ValueError, match="equally many rounds, got 5 and 1"):
        spread.over(Spread((1.0,)))


def test_the_stopwatch_returns_what_the_work_returned():
    for cpu_time, clock in ((False, "wall clock"), (True, "CPU seconds")):
        stopwatch = Stopwatch(CPU, cpu_time)
        seconds, result = stopwatch.time(lambda: sum(range(100_000)))
        assert seconds > 0 and result == 4_999_950_000
        assert stopwatch.clock == clock
    with pytest.raises(ValueError, match="CPU seconds say nothing about cuda"):
        Stopwatch(torch.device("cuda"), cpu_time=True)


# ---- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda values: values.tolist(), 1),
        (lambda values: values.repeat(3, 1).tolist(), 1),  # however many elements
        (lambda values: values.sum().item(), 1),
        (lambda values: bool(values.any()), 1),
        (lambda values: values.nonzero(), 1),
        (lambda values: values[values > 1], 1),
        (lambda values: values.repeat_interleave(values), 1),
        (lambda values: values.cpu().numpy(), 2),
        (lambda values: values.cumsum(0)[torch.tensor([1])] + 1, 0),
    ],
)
def test_device_reads(read, count):
    values = torch.tensor([1, 2])
    assert counting.device_reads(lambda: read(values), CPU) == count
    assert values.tolist() == [1, 2]  # and nothing stays behind


def test_peak_memory_is_what_was_held_at_once():
    def work():
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(1000, 500)  # 2 MB
        del first
        return torch.empty(1000, 100), second  # 0.4 MB

    assert counting.peak_memory(work, CPU)["beyond"] == 3_000_000


def test_stages_are_read_from_ranges():
    def work():
        with torch.profiler.record_function("reccomp::outer"):
            torch.ones(10).sum()
            for _ in range(2):
                with torch.profiler.record_function("reccomp::inner"):
                    torch.ones(10).sum()
        torch.ones(10).sum()

    found = stages.stage_seconds(work, CPU)
    assert found.keys() == {"outer", "inner", stages.WHOLE, stages.REST}
    assert found["inner"] < found["outer"] < found[stages.WHOLE]
    # What lies within a stage is not taken off twice.
    assert found[stages.REST] == pytest.approx(found[stages.WHOLE] - found["outer"])


@pytest.mark.parametrize("capacity_of_machine", [0, 1, 2, 3, 8, 13, 31, 32, 40])
def test_the_largest_batch_is_found(capacity_of_machine):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= capacity_of_machine

    assert capacity.largest(fits, limit=32) == min(capacity_of_machine, 32)
    assert max(tried) <= 32 and len(tried) == len(set(tried))


def test_the_largest_batch_needs_a_gpu():
    with pytest.raises(ValueError, match="searched for on a GPU; the model is on cpu"):
        capacity.largest_batches(LLAVA.compressed(), lambda size: {})


def test_work_that_does_not_fit():
    def work():
        raise torch.cuda.OutOfMemoryError("no")

    def without_workspace():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

    def broken():
        raise RuntimeError("shapes do not fit")

    assert not capacity.runs(work) and not capacity.runs(without_workspace)
    assert capacity.runs(lambda: None)
    with pytest.raises(RuntimeError, match="shapes"):
        capacity.runs(broken)


# ---- models and inputs ---------------------------------------------------------------------------------------------


def test_the_mid_size_configuration():
    config = named_config(MID, "paper")
    counts = parameter_counts(config)
    assert 280e6 < counts["language_model"] < 320e6
    assert counts["vision_tower"] < counts["language_model"] / 10
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 == 576
    assert named_config(MID, "balanced").token_recovery.budget == 64
    assert named_config("llava-1.5-13b", "balanced").text_config.hidden_size == 5120
    with pytest.raises(ValueError, match=r"Unknown configuration 'big'; known ones are mid, llava-1\.5-7b"):
        named_config("big", "paper")


@pytest.mark.parametrize("architecture", [LLAVA, LLAVA_NEXT], ids=lambda row: row.name)
def test_random_models_are_built_in_their_dtype(architecture):
    config = architecture.compressed().config
    before = config.to_dict()
    model = random_model(config, CPU, torch.bfloat16)
    assert config.to_dict() == before, "the config is the caller's"
    assert isinstance(model, architecture.model_class) and not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    again = random_model(config, CPU, torch.bfloat16)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_sharpening_gives_the_dynamic_mode_something_to_keep():
    model = random_model(LLAVA.compressed().config, CPU, torch.float32)
    inputs = noise_inputs(model, 4)

    def share():
        return sum(int(record.counts.sum()) for record in model.recover(**inputs)) / 400

    before = share()
    sharpen(model, inputs, share=0.2)
    assert abs(share() - 0.2) <= abs(before - 0.2)
    sharpen(model, inputs, share=before)  # starts from what is there
    assert share() == pytest.approx(before, abs=abs(before - 0.2))


def test_noise_is_the_seeds_and_every_row_asks_another_question():
    model = LLAVA_NEXT.compressed()
    one, two, other = (noise_inputs(model, 3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert len({tuple(row) for row in one["recovery_input_ids"].flatten(1).tolist()}) == 3
    assert one["image_sizes"].tolist() == [[50, 70]] * 3
    with pytest.raises(ValueError, match="text tokens must be at least 2, got 1"):
        noise_batch(model, 1, PICTURE, text_tokens=1)
    with pytest.raises(ValueError, match="question tokens must be 2 to 77, got 78"):
        noise_batch(model, 1, PICTURE, question_tokens=78)
