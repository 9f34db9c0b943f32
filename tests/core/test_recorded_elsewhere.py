"""The parts that a GPU records, run on a device that need not exist: no read, no host copy, no mix of devices.

Every method with a fixed budget and every preset, from the images to the first token's logits, with rows of different
lengths and numbers of pictures, in three dtypes.
"""

import pytest
import torch
from architectures import ROWS, each_architecture
from fixed_budgets import DYNAMIC, METHODS, PRESETS, each_budget, each_known
from prefill_elsewhere import recorded_elsewhere

LANGUAGE_MODEL = "language model"


def check(found, names):
    assert found.keys() == names
    for name, costs in found.items():
        assert not costs.copies, (name, costs.copies)
        assert sum(costs.operators.values()) > 50, name


@each_known
@each_architecture
def test_every_method_is_recorded(architecture, fields):
    front = "front with words" if fields.get("method") == "mmtok" else "front"
    check(recorded_elsewhere(architecture, architecture.encode(ROWS), fields), {LANGUAGE_MODEL, front})


@pytest.mark.parametrize("method", DYNAMIC)
@each_architecture
def test_a_dynamic_method_runs_without(architecture, method):
    check(recorded_elsewhere(architecture, architecture.encode(ROWS), METHODS[method]), {LANGUAGE_MODEL})


@each_budget
@each_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_recorded(architecture, dtype, fields):
    check(recorded_elsewhere(architecture, architecture.encode(ROWS), fields, dtype), {LANGUAGE_MODEL, "front"})


@each_architecture
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:2], ROWS[3:] * 2], ids=["one", "two pictures", "long questions"])
def test_rows_of_every_kind_are_recorded(architecture, rows):
    fields = PRESETS["preset balanced"]
    check(recorded_elsewhere(architecture, architecture.encode(rows), fields), {LANGUAGE_MODEL, "front"})
