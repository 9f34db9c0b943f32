"""Every value of the section is refused where it is set, or comes back from config.json unchanged and can be used."""

import json
import math

import hypothesis
import numpy as np
import pytest
import torch
from architectures import LLAVA, ROWS, each_architecture
from hypothesis import strategies as st

import reccomp_hf
from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.core.methods.registry import method_names
from reccomp_hf.core.settings import CHOICES, FIELDS, LARGEST

OPTIONS = (("prumerge_plus", "neighbors"), ("vispruner", "step"), ("vispruner", "important_share"), ("random", "seed"))
NUMBERS = ("budget", "text_share", "coverage_share", "merged_tokens", "outlier_neighbors", "merge_neighbors")
NUMBERS += ("outlier_threshold", "text_relevance_sign", "visual_layer", "version")
FOREIGN = {
    "NaN": math.nan,
    "infinity": math.inf,
    "numpy NaN": np.float64("nan"),
    "2^63": 2**63,
    "-2^64": -(2**64),
    "an int of 5000 digits": 10**5000,
    "numpy int": np.int64(1),
    "numpy float": np.float32(0.5),
    "numpy bool": np.True_,
    "numpy array": np.ones(2),
    "torch int": torch.tensor(1),
    "torch float": torch.tensor(0.5),
    "a list": [1],
    "a list of NaN": [[math.nan]],
    "a set": {1},
    "an object": object(),
}
each_foreign = pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN)


@each_foreign
@pytest.mark.parametrize("field", [*NUMBERS, *CHOICES, "enabled", "method", "method_options", "text_encoder_config"])
def test_a_value_that_json_or_the_field_does_not_have_is_refused(field, value):
    for given in ({field: value}, {"method": "visual", "budget": 3, field: value}):
        with pytest.raises(ValueError, match=f"token_recovery.{field} must be"):
            TokenRecoveryConfig(**given)
    with pytest.raises(ValueError, match=f"token_recovery.{field} must be"):
        TokenRecoveryConfig().replace({field: value})


@each_foreign
@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_an_option_is_refused_as_a_field_is(method, name, value):
    for given in (value, [value], {"nested": value}):
        with pytest.raises(ValueError, match=r"method_options (of method .* must be|must be plain JSON)"):
            TokenRecoveryConfig(method=method, budget=8, method_options={name: given})


@each_foreign
def test_a_text_encoder_is_refused_as_a_field_is(value):
    encoder = LLAVA.text_config()
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "projection_dim", "hidden_act"):
        with pytest.raises(ValueError, match=r"token_recovery\.text_encoder_config"):
            TokenRecoveryConfig(text_encoder_config={**encoder, name: value})


def test_numbers_have_bounds():
    for name in ("merged_tokens", "outlier_neighbors", "merge_neighbors"):
        assert getattr(TokenRecoveryConfig(**{name: LARGEST}), name) == LARGEST
        with pytest.raises(ValueError, match=f"{name} must be an int up to {LARGEST}, got {LARGEST + 1}"):
            TokenRecoveryConfig(**{name: LARGEST + 1})
    with pytest.raises(ValueError, match=r"outlier_threshold must be a number > 0 and up to \d+, got 1e\+300"):
        TokenRecoveryConfig(outlier_threshold=1e300)
    with pytest.raises(ValueError, match="visual_layer must be an int >= -2147483647, got -2147483648"):
        TokenRecoveryConfig(visual_layer=-(2**31))
    with pytest.raises(ValueError, match=r"budget must be .* got 9223372036854775807"):
        TokenRecoveryConfig(budget=2**63 - 1)


def test_a_float_that_equals_a_choice_is_refused():
    for field in ("text_relevance_sign", "version"):
        with pytest.raises(ValueError, match=f"{field} must be .* got 1.0"):
            TokenRecoveryConfig(**{field: 1.0})


def test_numbers_that_are_plain_in_all_but_type_become_plain():
    section = TokenRecoveryConfig(budget=np.float64(0.5), outlier_threshold=np.float64(1.25))
    assert type(section.budget) is type(section.outlier_threshold) is float
    assert TokenRecoveryConfig(**json.loads(json.dumps(section.to_dict(), allow_nan=False))) == section


@each_architecture
@pytest.mark.parametrize("name", ["self", "cls", "name", "fields", "unknown", "value", 3, None, ("budget",)], ids=repr)
def test_a_field_of_any_other_name_is_unknown(architecture, name):
    calls = [
        lambda: TokenRecoveryConfig.from_value({name: 1}),
        lambda: TokenRecoveryConfig().replace({name: 1}),
        lambda: architecture.config_class(token_recovery={name: 1}),
        lambda: architecture.compressed()(**architecture.encode(ROWS[:1]), token_recovery={name: 1}),
    ]
    if isinstance(name, str):
        calls += [
            lambda: TokenRecoveryConfig(**{name: 1}),
            lambda: TokenRecoveryConfig.from_preset("paper", **{name: 1}),
        ]
    for call in calls:
        with pytest.raises(ValueError, match="Unknown token_recovery field"):
            call()


@pytest.mark.parametrize("number", ["Infinity", "NaN", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_config_file_with_a_number_that_json_does_not_have_is_refused(tmp_path, number):
    LLAVA.compressed().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text().replace('"outlier_threshold": 1.5', f'"outlier_threshold": {number}')
    assert number in text
    file.write_text(text)
    with pytest.raises(ValueError, match=r"token_recovery.outlier_threshold must be"):
        reccomp_hf.LlavaRecCompConfig.from_pretrained(tmp_path)


# ---- random sections -----------------------------------------------------------------------------------------------

_INTS = st.one_of(st.integers(-3, 70), st.sampled_from([LARGEST, LARGEST + 1, 2**63 - 1, 2**63, -(2**63), 10**400]))
_FLOATS = st.one_of(st.floats(), st.floats(0, 2), st.sampled_from([1e-320, -0.0, 1.0, 1e19]))
_FOREIGN = st.sampled_from([None, True, np.int64(3), np.float64(0.25), np.True_, torch.tensor(2), object(), b"a", {1}])
_SCALARS = st.one_of(_INTS, _FLOATS, _FOREIGN, st.text(max_size=3))
_NESTED = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
)
_OPTIONS = st.dictionaries(
    st.sampled_from(["neighbors", "step", "seed", "important_share", "contextual_share", "uniform_share", "self"]),
    st.one_of(st.integers(0, 20), st.floats(0, 1), _NESTED),
    max_size=2,
)
_FITTING = {
    "enabled": st.booleans(),
    "budget": st.one_of(st.none(), st.integers(1, 40), st.floats(0.01, 1)),
    "text_share": st.floats(0, 1),
    "coverage_share": st.floats(0, 1),
    "merged_tokens": st.integers(0, 30),
    "outlier_neighbors": st.integers(1, 80),
    "merge_neighbors": st.integers(1, 80),
    "outlier_threshold": st.floats(0.01, 5),
    "visual_layer": st.integers(-5, -1),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
}
SECTIONS = st.tuples(
    st.fixed_dictionaries({}, optional={**_FITTING, "method": st.sampled_from(method_names())}),
    st.one_of(st.just({}), st.builds(lambda options: {"method_options": options}, _OPTIONS)),
    st.one_of(st.just({}), st.dictionaries(st.sampled_from([*FIELDS, "self", "bugdet"]), _NESTED, max_size=1)),
).map(lambda parts: {**parts[0], **parts[1], **parts[2]})


def check_section(fields):
    """Refused where it is set; or the same from config.json, and a model answers or refuses it.

    Returns:
        `"refused"`, `"refused by the model"` or `"answered"`.
    """
    try:
        section = TokenRecoveryConfig.from_value(fields)
    except ValueError:
        return "refused"
    written = json.dumps(section.to_dict(), allow_nan=False)
    assert TokenRecoveryConfig(**json.loads(written)) == section
    assert json.dumps(TokenRecoveryConfig(**json.loads(written)).to_dict()) == written
    try:
        with torch.no_grad():
            setting = {name: value for name, value in fields.items() if name != "text_encoder_config"}
            output = LLAVA.compressed()(**LLAVA.encode(ROWS[:1]), token_recovery=setting)
    except ValueError:
        return "refused by the model"
    assert output.logits.isfinite().all()
    return "answered"


@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(SECTIONS)
def test_random_sections_are_refused_or_used(fields):
    check_section(fields)
