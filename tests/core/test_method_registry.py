"""The registry of methods: names, options and defaults, and a method of one's own from outside the package."""

import dataclasses
import json

import pytest
import torch
from architectures import ROWS, each_architecture, generate
from cases import make_case
from host_reads import HostReads
from transformers import AutoConfig, AutoModelForImageTextToText

import reccomp_hf
from reccomp_hf import MergedTokens, RecoveryMethod, TokenRecoveryConfig, register_method
from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.methods.contract import METHOD_FIELDS
from reccomp_hf.core.methods.registry import _METHODS, get_method, method_names
from reccomp_hf.measure.evaluation import parse_setting, parse_settings

NAMES = tuple(method_names())
WITH_BUDGET = [name for name in NAMES if get_method(name).budget != "none"]
NEED_TEXT = [name for name in NAMES if get_method(name).text == "required"]
PATCHES = 16
each_name = pytest.mark.parametrize("name", NAMES)
each_with_budget = pytest.mark.parametrize("name", WITH_BUDGET)


# ---- a method of one's own -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EveryOptions:
    """Every so manieth patch."""

    step: int = 2

    def __post_init__(self):
        if not isinstance(self.step, int) or self.step < 1:
            raise ValueError(f"step must be an int >= 1, got {self.step!r}.")


def select_every(features, config):
    """Every `step`-th valid patch is kept, and the one before it is what the rest is averaged around."""
    place = features.valid.cumsum(-1) - 1
    kept = features.valid & (place % config.options.step == 0)
    rest = features.valid & ~kept
    centre = rest & (rest.cumsum(-1) == 1)
    saliency = features.saliency(config.visual_heads)
    return features.keep(coverage=kept, centres=centre, merged_counts=centre.sum(-1), saliency=saliency)


def merge_every(features, selection, config, max_merged):
    """The mean of the rest."""
    rest = features.valid & ~selection.kept_mask
    weights = rest / rest.sum(-1, keepdim=True).clamp(min=1)
    tokens = (weights.unsqueeze(1) @ features.hidden_states)[:, :max_merged]
    return MergedTokens(tokens, selection.centre_mask.long().argmax(-1, keepdim=True)[:, :max_merged], rest.long() - 1)


EVERY = RecoveryMethod(
    select_every, merge_every, budget="none", defaults={"visual_heads": "mean"}, options=EveryOptions
)


@pytest.fixture
def registry(monkeypatch):
    """The registry, as it was before after the test."""
    before = dict(_METHODS)
    yield _METHODS
    _METHODS.clear()
    _METHODS.update(before)


@torch.no_grad()
@each_architecture
def test_a_registered_method_works_end_to_end(architecture, registry, tmp_path):
    register_method("every", EVERY)
    model, batch = architecture.build(), architecture.encode(ROWS[:3])
    model.config.token_recovery = {"method": "every", "method_options": {"step": 3}}
    assert model.config.token_recovery.visual_heads == "mean"
    for record in model.recover(**batch):
        tiles = [row for row in range(len(record.counts)) if record.counts[row]]
        assert record.coverage_mask.any(-1)[tiles].all() and record.centre_mask.sum() == len(tiles)
        for row in tiles:
            rest = model_states(model, batch, record, row)
            torch.testing.assert_close(record.tokens[row, record.counts[row] - 1], rest, rtol=1e-4, atol=1e-5)
    ids = generate(model, batch)
    assert model(**batch).visual_token_counts.min() > 1
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["token_recovery"]
    assert (section["method"], section["method_options"]) == ("every", {"step": 3})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(generate(again, batch), ids)
    counts = again(**batch, token_recovery={"method_options": {"step": 5}}).visual_token_counts
    assert (counts < again(**batch).visual_token_counts).all()
    registry.pop("every")
    for load in (AutoModelForImageTextToText, AutoConfig, architecture.model_class):
        with pytest.raises(
            ValueError, match=r"Unknown token_recovery.method 'every'; known .*Register a method of yo"
        ):
            load.from_pretrained(tmp_path)


def model_states(model, batch, record, row):
    """Mean of the dropped patches of a row, found among all tiles by what the record keeps."""
    seen = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    encoded = model.encode_images(**seen)
    states = encoded.states[model.config.vision_feature_layer % (len(tower_blocks(model)) + 1)][:, 1:]
    kept = record.tokens[row, 0]
    (tile,) = {int(index) for index in (states - kept).abs().amax(-1).lt(1e-6).nonzero()[:, 0]}
    return states[tile, record.cluster[row] == record.counts[row] - 1].mean(0)


def tower_blocks(model):
    return clip_vision_model(model.model.vision_tower).encoder.layers


@torch.no_grad()
@each_architecture
def test_a_method_sees_projected_features_if_it_asks(architecture, registry):
    seen = []

    def select(features, config):
        seen.append(features)
        return get_method("random").select(features, config)

    settings = {"options": get_method("random").options, "budget": "required"}
    register_method("asks", RecoveryMethod(select, reads_projected=True, **settings))
    register_method("does not", RecoveryMethod(select, **settings))
    model, batch = architecture.compressed(), architecture.encode(ROWS[:2])
    for name in ("asks", "does not"):
        model.recover(**batch, token_recovery={"method": name, "budget": 7})
    assert seen[1].projected is None
    expected = model.model.multi_modal_projector(seen[0].hidden_states)
    torch.testing.assert_close(seen[0].projected, expected)
    assert not seen[0].projected.requires_grad


def test_registering(registry):
    with pytest.raises(ValueError, match=r"The method name 'random' is taken; choose another, or pass overwrite=True"):
        register_method("random", EVERY)
    register_method("random", EVERY, overwrite=True)
    assert get_method("random") is EVERY and method_names() == list(NAMES)
    register_method("every", EVERY)
    with pytest.raises(ValueError, match="'every' is taken"):
        register_method("every", EVERY)
    for name in ("", None, 3):
        with pytest.raises(ValueError, match=rf"name must be a non-empty string, got {name!r}"):
            register_method(name, EVERY)
    with pytest.raises(ValueError, match="must be a RecoveryMethod, got function"):
        register_method("mine", select_every)
    assert {"RecoveryMethod", "TokenSelection", "VisualFeatures", "register_method"} <= {*reccomp_hf.__all__}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"defaults": {"budget": 3}}, "defaults may name text_relevance, .*visual_heads, got 'budget'"),
        ({"budget": "maybe"}, "budget must be 'optional' or 'required' or 'none', got 'maybe'"),
        ({"options": dict}, "options must be a dataclass with defaults, got <class 'dict'>"),
    ],
)
def test_impossible_methods(fields, message):
    with pytest.raises(ValueError, match=message):
        RecoveryMethod(select_every, **fields)


# ---- settings ------------------------------------------------------------------------------------------------------


def fields_of(name, budget=8):
    return {"method": name} | ({"budget": budget} if get_method(name).budget == "required" else {})


@each_name
@each_architecture
def test_a_method_keeps_its_settings_in_a_saved_config(architecture, name, tmp_path):
    method = get_method(name)
    options = {field.name: field.default for field in dataclasses.fields(method.options)} if method.options else {}
    section = {**fields_of(name), "method_options": options, "text_encoder_config": architecture.text_config()}
    config = architecture.config_class(token_recovery=section)
    config.save_pretrained(tmp_path)
    again = architecture.config_class.from_pretrained(tmp_path)
    assert again.token_recovery == config.token_recovery
    assert again.token_recovery.options == config.token_recovery.options
    written = json.loads((tmp_path / "config.json").read_text())["token_recovery"]
    assert written["method_options"] == options
    assert {key: written[key] for key in method.defaults} == method.defaults


def test_another_method_brings_its_own_settings():
    start = TokenRecoveryConfig.from_preset("balanced")
    other = start.replace({"method": "cdpruner"})
    assert (other.text_relevance, other.text_relevance_sign, other.visual_layer) == ("penultimate", -1, -1)
    assert (other.budget, other.position_ids, other.coverage_share) == (64, "original", 0.125)  # these stay
    assert start.replace({"method": "cdpruner", "visual_layer": -3}).visual_layer == -3
    seeded = start.replace({"method": "random", "method_options": {"seed": 4}})
    assert seeded.options.seed == seeded.replace({"budget": 3}).options.seed == 4
    assert seeded.replace({"method": "random"}).method_options == {"seed": 4}
    assert seeded.replace({"method": "visionzip"}).method_options == {}
    assert seeded.replace({"method_options": {}}).options.seed == 0
    preset = TokenRecoveryConfig.from_preset("balanced", method="trim")
    assert all(getattr(preset, key) == value for key, value in get_method("trim").defaults.items())
    given = TokenRecoveryConfig(method="trim", text_relevance="value")
    assert (given.text_relevance, given.text_relevance_sign) == ("value", -1)
    assert all(
        getattr(TokenRecoveryConfig(), key) == getattr(start.replace({"method": "random"}), key)
        for key in METHOD_FIELDS
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, r"Unknown token_recovery.method 'magic'.*reccomp_hf.register_method\(name, method\)"),
        ({"method_options": 3}, "method_options must be a mapping of the method's options, got 3"),
        ({"method_options": {"seed": 1}}, "method_options 'seed' of method 'recoverable'; it has no options"),
        ({"method": "prumerge", "method_options": {"neighbours": 3}}, "'neighbours' .*did you mean 'neighbors'"),
        (
            {"method": "prumerge", "method_options": {"neighbors": 0}},
            "'prumerge': neighbors must be an int >= 1, got 0",
        ),
        ({"method": "base_tile", "budget": 3}, "'base_tile' .*needs budget=None, got 3"),
    ],
    ids=str,
)
def test_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenRecoveryConfig(**fields)


def test_commas_and_pluses_of_json_do_not_split():
    text = 'prumerge_plus:9+method_options={"neighbors":3,"uniform_share":5e+0},off,random:4+method_options={"seed":2}'
    with pytest.raises(ValueError, match=r"uniform_share must be a number in \[0, 1\], got 5.0"):
        parse_settings(text)
    settings = parse_settings(text.replace("5e+0", "25e-2"))
    assert [setting.name.partition(":")[0] for setting in settings] == ["prumerge_plus", "off", "random"]
    assert settings[0].fields["method_options"] == {"neighbors": 3, "uniform_share": 0.25}
    assert settings[2].fields["method_options"] == {"seed": 2}


@each_name
def test_every_method_is_a_setting(name):
    budget = {"required": ":9", "optional": ":dynamic", "none": ""}[get_method(name).budget]
    if name == "visual":  # the paper's stage is called that, since its figures were measured under this name
        assert parse_setting("visual:9").fields["method"] == "recoverable"
        name, method = "fastervlm", name
    else:
        method = name
    fields = parse_setting(name + budget).fields
    assert fields["method"] == method
    assert fields.items() >= get_method(method).defaults.items()


# ---- what a choice promises ----------------------------------------------------------------------------------------


@each_with_budget
def test_every_budget_is_spent_exactly_and_nothing_is_read_from_the_device(name, monkeypatch):
    case, projected = make_case(batch=2, n=PATCHES, c=16), torch.randn(2, PATCHES, 8)
    outputs = {}
    with HostReads(monkeypatch) as reads:
        for budget in range(1, PATCHES + 1):
            config = TokenRecoveryConfig(method=name, budget=budget, position_ids="original")
            outputs[budget] = case.recover(config, projected=projected, num_heads=4)
    assert reads.seen == []
    for budget, output in outputs.items():
        if name != "pooling":  # whole cells come as near as they can
            assert output.counts.tolist() == [budget] * 2
        width = int(output.counts[0])
        assert output.tokens.shape == (2, width, 16)
        assert ((output.places >= 0) & (output.places < PATCHES)).all()  # every token has a place
        assert all(len(set(row)) == width for row in output.places.tolist())
        stands_for = output.kept_mask | output.centre_mask
        assert torch.equal(stands_for, torch.zeros_like(stands_for).scatter(1, output.places, True))
        assert not (output.kept_mask & output.centre_mask).any()
    assert outputs[PATCHES].kept_mask.all() or name == "pooling"


@pytest.mark.parametrize("name", NEED_TEXT)
@each_architecture
def test_no_question_is_refused(architecture, name):
    setting, batch, model = fields_of(name), architecture.encode(ROWS[:2]), architecture.compressed()
    without = {key: value for key, value in batch.items() if not key.startswith("recovery")}
    for text_share in (0.0, 0.5):
        refused = rf"recovery_(input_ids|words) is None.*method '{name}' is undefined without one"
        with pytest.raises(ValueError, match=refused):
            model(**without, token_recovery={**setting, "text_share": text_share})
    mask = torch.zeros_like(batch["recovery_attention_mask"])
    with pytest.raises(ValueError, match=rf"Row 0 has an image but no question.*'{name}' is undefined without one"):
        model(**{**batch, "recovery_attention_mask": mask}, token_recovery=setting)
    config = architecture.config_class(**{**model.config.to_dict(), "token_recovery": setting})
    with pytest.raises(ValueError, match=f"Method '{name}' needs a question"):
        architecture.model_class(config)(**batch)  # a visual-only model
