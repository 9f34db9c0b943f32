"""Methods run where the features are. No accelerator is needed: `meta` stands for one, and torch checks the devices.

Under `FakeTensorMode` no numbers are computed, but an operation on tensors of two devices raises as it does on a GPU,
and so does reading a tensor.
"""

import pytest
import torch
from second_device import features_elsewhere, run_elsewhere

from reccomp_hf import RecoveryMethod, TokenRecoveryConfig, method_names
from reccomp_hf.core.methods.registry import get_method

BUDGETS = {"none": (None,), "required": (4,), "optional": (None, 4)}
each_setting = pytest.mark.parametrize(
    ("name", "budget"), [(name, budget) for name in method_names() for budget in BUDGETS[get_method(name).budget]]
)
each_form = pytest.mark.parametrize("tiles", [None, [2, 1]], ids=["an image", "tiles"])


@each_form
@each_setting
def test_a_method_runs_on_the_device_of_the_features(name, budget, tiles):
    settings = TokenRecoveryConfig(method=name, budget=budget)
    assert run_elsewhere(get_method(name), settings, tiles) == {"meta"}


@each_form
@pytest.mark.parametrize("fields", [{"coverage_share": 0.5}, {"coverage_share": 0.5, "coverage_by": "content"}])
@pytest.mark.parametrize("by", ["similarity", "diversity"])
@pytest.mark.parametrize("limit", ["share", "outliers", "half_outliers", "half_or_few"])
def test_every_way_to_spend_a_budget_runs_there(fields, limit, by, tiles):
    settings = TokenRecoveryConfig(budget=8, text_limit=limit, text_by=by, merged_tokens=2, **fields)
    assert run_elsewhere(get_method("recoverable"), settings, tiles) == {"meta"}


def on_the_host(features, settings):
    """A method whose order of patches is made on the default device."""
    patches = features.valid.shape[1]
    order = torch.arange(patches).expand(len(features.valid), -1)
    return features.keep(coverage=torch.zeros_like(features.valid).scatter(1, order[:, : settings.budget], True))


def reading(features, settings):
    """A method that reads a score from the device."""
    return features.keep(coverage=features.valid & (features.saliency().sum().item() > 0))


@pytest.mark.parametrize(
    ("select", "error"),
    [(on_the_host, "two (different )?devices"), (reading, "_local_scalar_dense")],
    ids=["two devices", "a read"],
)
def test_the_check_can_fail(select, error):
    with pytest.raises(Exception, match=error):
        run_elsewhere(RecoveryMethod(select), TokenRecoveryConfig(budget=4), None)


def test_the_features_are_elsewhere():
    assert {features_elsewhere(tiles).valid.device.type for tiles in (None, [2, 1])} == {"meta"}
