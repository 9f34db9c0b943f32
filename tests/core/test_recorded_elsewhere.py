"""The parts that a GPU records, run on a device that need not exist: no read, no host copy, no mix of devices.

Every method with a fixed budget and every preset, from the images to the first token's logits, with rows of different
lengths and numbers of pictures, in three dtypes.
"""

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, ROWS, each_architecture
from fixed_budgets import each_budget
from prefill_elsewhere import recorded_elsewhere

from reccomp_hf import TokenRecoveryConfig, method_names
from reccomp_hf.core.methods.registry import get_method

SETTINGS = {
    name: {"method": name, **({} if get_method(name).budget == "none" else {"budget": 16})} for name in method_names()
}
SETTINGS |= {
    f"preset {name}": {**TokenRecoveryConfig.from_preset(name).overridable(), "budget": 16}
    for name in ("paper", "balanced", "balanced-v1")
}
DEPENDS_ON_THE_IMAGES = ("authors", "base_tile")
LANGUAGE_MODEL = "language model"
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def check(found, names):
    assert found.keys() == names
    for name, costs in found.items():
        assert not costs.copies, (name, costs.copies)
        assert sum(costs.operators.values()) > 50, name


@each_setting
def test_every_method_is_recorded(setting):
    found = recorded_elsewhere(LLAVA, LLAVA.encode(ROWS), SETTINGS[setting])
    front = {"front with words" if setting == "mmtok" else "front"}
    check(found, {LANGUAGE_MODEL} | (front if setting not in DEPENDS_ON_THE_IMAGES else set()))


@each_setting
def test_every_method_runs_on_tiles(setting):
    """Recorded if a bound of the sizes is known: for `recoverable`."""
    found = recorded_elsewhere(LLAVA_NEXT, LLAVA_NEXT.encode(ROWS), SETTINGS[setting])
    bounded = SETTINGS[setting]["method"] == "recoverable"
    check(found, {LANGUAGE_MODEL, "front"} if bounded else {LANGUAGE_MODEL})


@each_budget
@each_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_recorded(architecture, dtype, fields):
    check(recorded_elsewhere(architecture, architecture.encode(ROWS), fields, dtype), {LANGUAGE_MODEL, "front"})


@each_architecture
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:2], ROWS[3:] * 2], ids=["one", "two pictures", "long questions"])
def test_rows_of_every_kind_are_recorded(architecture, rows):
    fields = SETTINGS["preset balanced"]
    check(recorded_elsewhere(architecture, architecture.encode(rows), fields), {LANGUAGE_MODEL, "front"})
