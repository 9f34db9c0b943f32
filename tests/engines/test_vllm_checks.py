"""Checks of checkpoints and requests for vLLM that need no engine."""

import sys
import types

import pytest
import tiny
import torch
from architectures import LLAVA, LLAVA_NEXT
from next_model import NEXT, PINPOINTS, SIZES, encode, stock_model
from transformers import CONFIG_MAPPING

from reccomp_hf.core import compat
from reccomp_hf.engines import vllm as plugin
from reccomp_hf.engines.vllm.budgets import (
    budget_from_tensor,
    budget_to_tensor,
    count_tokens,
    longest_question,
    question_budget,
    request_budget,
    request_section,
)
from reccomp_hf.engines.vllm.checks import check_request, check_servable
from reccomp_hf.engines.vllm.tower import clip_tower

PICTURE = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def config_of(architecture=LLAVA, **fields):
    stock = stock_model("llama").config if architecture is LLAVA_NEXT else tiny.llava_config()
    values = {
        name: value for name, value in stock.to_dict().items() if name not in ("model_type", "transformers_version")
    }
    encoder = architecture.text_config()
    return architecture.config_class(token_recovery={"text_encoder_config": encoder, **fields}, **values)


def test_registering_names_the_classes_alone(monkeypatch):
    """By name, so that nothing of an engine is imported: vLLM does that in its own time."""
    registered, settings = {}, {}
    registry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    config = types.SimpleNamespace(MODELS_CONFIG_MAP=settings)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", config)
    ours = types.SimpleNamespace(RecoverySettings=object())
    monkeypatch.setitem(sys.modules, "reccomp_hf.engines.vllm.settings", ours)
    plugin.register()
    plugin.register()
    assert settings == dict.fromkeys(plugin.ARCHITECTURES, ours.RecoverySettings)
    assert registered == {name: f"reccomp_hf.engines.vllm.models:{name}" for name in plugin.ARCHITECTURES}
    assert {row.model_class.__name__ for row in (LLAVA, LLAVA_NEXT)} == {*registered}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        (LLAVA, {"budget": 24}),
        (LLAVA, {"budget": 0.5, "method": "divprune", "text_encoder_config": None}),
        (LLAVA, {"method": "pooling_2x2"}),  # the size says how many
        (LLAVA, {"enabled": False, "position_ids": "original"}),
        (LLAVA, {"budget": 24, "position_ids": "original"}),
        (LLAVA_NEXT, {"budget": 24, "newlines": "none"}),
        (LLAVA_NEXT, {"enabled": False}),
    ],
)
def test_what_is_served(architecture, fields):
    config = config_of(architecture, **fields)
    check_servable(config)
    assert count_tokens(config, None, PICTURE) > 0


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        (LLAVA, {}, r'budget is null.*"budget": 64.*or compress outside'),
        (LLAVA, {"method": "trim"}, r"budget is null"),
        (LLAVA, {"method": "pooling", "budget": 24}, r"'pooling' gives whole cells.*\"method\": \"recoverable\""),
        (LLAVA, {"method": "authors"}, r"'authors' has no budget.*or compress outside vLLM"),
        (LLAVA, {"budget": 101}, r"budget is 101, but an image has only 100 patches"),
        (LLAVA_NEXT, {"budget": 24}, r'newlines is "kept".*"newlines": "none"'),
    ],
)
def test_what_is_refused(architecture, fields, message):
    with pytest.raises(ValueError, match=message):
        check_servable(config_of(architecture, **fields))


@pytest.mark.parametrize(
    ("tower", "strategy"), [("clip_vision_model", "full"), ("siglip_vision_model", "full")], ids=["full", "siglip"]
)
def test_a_model_that_is_off_is_served_where_its_tokens_are_counted(tower, strategy):
    config = config_of(enabled=False)
    config.vision_feature_layer = [-2, -3]  # as many tokens
    check_servable(config)
    config.vision_feature_select_strategy = strategy
    config.vision_config = CONFIG_MAPPING[tower]()
    with pytest.raises(ValueError, match=r"enabled false .* got '\w+' with .* 'full': serve the stock checkpoint"):
        check_servable(config)
    check_servable(config, pictures=False)


def test_embeddings_alone_need_no_count_but_positions():
    for fields in ({}, {"method": "authors"}, {"budget": 24}):
        check_servable(config_of(**fields), pictures=False, embeds=True)
    check_servable(config_of(LLAVA_NEXT), pictures=False, embeds=True)
    original = config_of(position_ids="original", budget=24)
    check_servable(original, pictures=False, embeds=False)  # text alone has no gaps
    for pictures in (False, True):
        with pytest.raises(ValueError, match=r"image_embeds do not say the positions.*\"position_ids\": \"compact\""):
            check_servable(original, pictures=pictures, embeds=True)


@pytest.mark.parametrize(
    ("own", "asked", "tokens"),
    [
        (24, None, 24),
        (24, 8, 8),
        (24, 24, 24),
        (24, 1, 1),
        (24, 0.1, 10),
        (0.2, 0.05, 5),
        (0.2, 20, 20),
        (1.0, 1.0, 100),
    ],
)
def test_a_request_may_ask_for_less(own, asked, tokens):
    config = config_of(budget=own)
    budget = request_budget(config.token_recovery, None if asked is None else {"budget": asked})
    assert count_tokens(config, budget, PICTURE) == tokens
    section = request_section(config.token_recovery, budget)
    assert section == config.token_recovery.replace({"budget": own if asked is None else asked})
    assert (budget is None) == (asked in (None, own))  # equal requests are equal in a cache


@pytest.mark.parametrize(("own", "asked"), [(1, 1.0), (1.0, 1)])
def test_one_token_and_all_tokens_are_different_budgets(own, asked):
    section = config_of(budget=own).token_recovery
    budget = request_section(section, request_budget(section, {"budget": asked})).budget
    assert (budget, type(budget)) == (asked, type(asked))


@pytest.mark.parametrize("budget", [None, 1, 1.0, 576, 10**30, 0.1, 1 / 3, 5e-324])
def test_a_budget_passes_through_a_tensor_unchanged(budget):
    tensor = budget_to_tensor(budget)
    assert (tensor.dtype, tensor.ndim) == (torch.uint8, 1)
    found = budget_from_tensor(tensor.expand(3, -1)[1])
    assert (found, type(found)) == (budget, type(budget))


@pytest.mark.parametrize(
    ("own", "overrides", "message"),
    [
        (24, {"budget": 25}, r"budget of 25 is 25 tokens of an image, more than the 24.*\"budget\": 25"),
        (24, {"budget": 0.25}, r"budget of 0.25 is 25 tokens of an image, more than the 24"),
        (0.2, {"budget": 1.0}, r"budget of 1.0 is 100 tokens of an image, more than the 20"),
    ],
)
def test_more_than_the_servers_budget_is_refused(own, overrides, message):
    config = config_of(budget=own)
    with pytest.raises(ValueError, match=message):
        count_tokens(config, request_budget(config.token_recovery, overrides), PICTURE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "random"}, r"may set only the budget, .* got \{'method': 'random'\}"),
        ({"budget": 8, "text_share": 0}, r"may set only the budget"),
        ({}, r"may set only the budget"),
        ("8", r"may set only the budget, .* got '8'"),
        ({"budget": True}, r"budget must be null, an int >= 1 or a float in \(0, 1\], got True"),
        ({"budget": "8"}, r"budget must be null"),
        ({"budget": None}, r"budget must be an int >= 1"),
    ],
)
def test_an_invalid_request_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        request_budget(config_of(budget=24).token_recovery, overrides)


LONG = "x" * 10_000_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": {"height": 9}}, r"Unknown field 'size' in mm_processor_kwargs; a request may set token_recovery, "),
        ({"budget": LONG}, r"Unknown field 'budget' .* write \{'token_recovery': \{'budget': 'x+\.\.\."),
        ({LONG: 1}, r"Unknown field 'x+\.\.\. in mm_processor_kwargs; a request"),
        ({"recovery_text": {LONG: 1}}, r"recovery_text in mm_processor_kwargs must be a string or a list of strings"),
        ({"recovery_turns": ["all"]}, r"recovery_turns in mm_processor_kwargs must be a string, got \['all'\]"),
        ({"recovery_text": "x" * 8193}, r"must have at most 8192 characters, .* prompt of 512 tokens has: shorten it"),
        ({"recovery_text": ["x"] * 8193}, r"must have at most 8192 characters"),
        ({"recovery_turns": LONG}, r"recovery_turns in mm_processor_kwargs must have at most 8192 characters"),
    ],
    ids=range(8),
)
def test_an_invalid_argument_is_refused_in_a_short_message(given, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_request(given, {}, 512)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("overrides", [LONG, {LONG: 1}, {"budget": LONG}], ids=["text", "field", "budget"])
def test_a_long_budget_is_refused_in_a_short_message(overrides):
    with pytest.raises(ValueError, match="budget") as raised:
        request_budget(config_of(budget=24).token_recovery, overrides)
    assert len(str(raised.value)) < 600


def test_arguments_of_a_request_and_of_the_server_are_let_through():
    check_request({"recovery_text": ["x" * 8000, "x" * 192], "recovery_turns": "all", "token_recovery": {}}, {}, 512)
    check_request({"recovery_text": None, "recovery_turns": None, "num_crops": 4}, {"num_crops": 4}, 512)
    with pytest.raises(ValueError, match="Unknown field 'num_crops'"):
        check_request({"num_crops": 5}, {"num_crops": 4}, 512)


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_counts_are_those_of_the_model(name):
    """Whatever the shape of a LLaVA-NeXT picture."""
    batch = encode(((name,),))
    assert [list(size) for size in NEXT.compressed().config.image_grid_pinpoints] == PINPOINTS
    for budget in (24, 0.1, 1.0):
        fields = {"budget": budget, "newlines": "none", "merged_tokens": 0}
        config = config_of(LLAVA_NEXT, **fields)
        output = NEXT.compressed()(**batch, token_recovery=fields)
        assert output.visual_token_counts.tolist() == [count_tokens(config, None, SIZES[name])]


class _Fused(torch.nn.Module):
    """Query, key and value in one projection that returns a pair, as vLLM's do."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def forward(self, states):
        return torch.cat([part(states) for part in self.parts], dim=-1), None


@torch.no_grad()
def test_a_fused_attention_is_split():
    tower = compat.clip_vision_model(LLAVA.compressed().model.vision_tower)
    own, layers = tower.encoder.layers[-1].self_attn, []
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        fused = _Fused(attention.q_proj, attention.k_proj, attention.v_proj)
        pair = types.SimpleNamespace(
            qkv_proj=fused, out_proj=lambda states, out=attention.out_proj: (out(states), None)
        )
        layers.append(types.SimpleNamespace(layer_norm1=layer.layer_norm1, self_attn=pair))
    theirs = types.SimpleNamespace(
        embeddings=tower.embeddings,
        pre_layrnorm=tower.pre_layrnorm,
        post_layernorm=tower.post_layernorm,
        encoder=types.SimpleNamespace(layers=layers),
    )
    found, states = clip_tower(theirs).encoder.layers[-1], torch.randn(2, 5, 32)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert torch.equal(getattr(found.self_attn, name)(states), getattr(own, name)(states)), name


# ---- rules ---------------------------------------------------------------------------------------------------------

RULES = [{"begins": "how many", "budget": 40}, {"begins": "is", "method": "divprune", "budget": 0.08}]


@pytest.mark.parametrize(
    ("questions", "tokens", "method"),
    [
        (["How many cats?"], 40, "recoverable"),
        (["How many cats?", "Is it red?"], 8, "divprune"),
        (["What is it?"], 24, "recoverable"),
        ([], 24, "recoverable"),
    ],
)
def test_the_question_decides_which_settings_hold(questions, tokens, method):
    config = config_of(budget=24, rules=RULES)
    budget = question_budget(config.token_recovery, questions)
    assert budget_from_tensor(budget_to_tensor(budget)) == budget
    section = request_section(config.token_recovery, budget)
    assert (count_tokens(config, budget, PICTURE), section.method, section.rules) == (tokens, method, [])


def test_a_requests_budget_sets_rules_aside_and_may_reach_the_largest():
    config = config_of(budget=24, rules=RULES)
    for asked, wanted in ((24, 24), (40, 40), (5, 5)):
        budget = request_budget(config.token_recovery, {"budget": asked})
        assert count_tokens(config, budget, PICTURE) == wanted
    with pytest.raises(ValueError, match=r"41 is 41 tokens of an image, more than the 40"):
        count_tokens(config, request_budget(config.token_recovery, {"budget": 41}), PICTURE)


@pytest.mark.parametrize(
    ("rules", "tokens"),
    [
        (RULES, 40),
        ([{"begins": "what", "budget": 3}], 24),
        ([{"begins": ["is", "how"], "budget": 3}, {"begins": "how", "budget": 90}], 24),
        ([], 24),
    ],
)
def test_memory_is_profiled_with_the_question_that_gives_most_tokens(rules, tokens):
    config = config_of(budget=24, rules=rules)
    question = longest_question(config, PICTURE)
    assert count_tokens(config, question_budget(config.token_recovery, [question]), PICTURE) == tokens


def test_rules_of_a_model_that_is_off_are_not_read():
    config = config_of(budget=24, rules=RULES, enabled=False)
    check_servable(config)
    assert question_budget(config.token_recovery, ["How many?"]) is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"budget": None}, r"^token_recovery\.rules\[1\]: token_recovery\.budget is null"),
        ({"method": "pooling", "budget": 9}, r"^token_recovery\.rules\[1\]: Method 'pooling' gives whole cells"),
        ({"method": "trim", "budget": None}, r"^token_recovery\.rules\[1\]: token_recovery\.budget is null"),
        ({"budget": 101}, r"rules\[1\]\.budget is 101, but an image has only 100"),
    ],
)
def test_a_rule_whose_count_is_not_known_is_refused(rule, message):
    check_servable(config_of(budget=24, rules=RULES[:1]))
    with pytest.raises(ValueError, match=message):
        check_servable(config_of(budget=24, rules=[RULES[0], {"begins": "is", **rule}]))
