"""Rules by question: which question a rule fits, what a section with rules holds, and what it refuses."""

import copy
import json
import pickle

import pytest
import tiny
import torch
from architectures import LLAVA, each_architecture, prompt_of

import reccomp_hf
from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.core.processing import LlavaRecCompProcessor
from reccomp_hf.core.rules import find_rule

RULES = [
    {"begins": ["how many", "What number"], "budget": 32, "text_share": 1.0},
    {"begins": "Is there", "method": "trim", "budget": 8},
    {"begins": "How", "budget": 4},
]


@pytest.mark.parametrize(
    ("question", "rule"),
    [
        ("How many cats are there?", 0),
        ("  HOW\tmany\n\ncats?", 0),
        ('\n"How many" is it?', 0),
        ("¿how many?", 0),
        ("how many", 0),
        ("how-many cats", 2),
        ("how manya", 2),
        ("how many\u0301", 2),
        ("how manyé", 2),
        ("\uff28ow many", 0),  # a wide letter
        ("however many", -1),
        ("what number", 0),
        ("what numbers", -1),
        ("is there", 1),
        ("Tell me: is there a cat?", -1),
        ("how", 2),
        ("ho", -1),
        ("", -1),
        ("?!", -1),
        ([], -1),
        (["How many?", "Is there a cat?"], 1),
    ],
)
def test_the_first_rule_that_fits_holds(question, rule):
    assert find_rule(RULES, question) == rule


@pytest.mark.parametrize(
    ("beginning", "question", "fits"),
    [
        ("STRASSE", "Straße?", True),
        ("что", "Что это?", True),
        ("что", "чтобы", False),
        ("何人", "何人いますか", True),
        ("cafe\u0301", "Café ouvert?", True),
        ("how many?", "How many? Say it.", True),
        ("3", "3 cats?", True),
        ("3", "34 cats?", False),
        ("की", "की मत", True),
        ("की", "कीमत क्या है?", False),  # a vowel is a mark, and the word goes on after it
        ("คำถามที่", "คำถามที่สอง", True),
    ],
)
def test_beginnings_in_other_writing(beginning, question, fits):
    assert find_rule([{"begins": beginning, "budget": 1}], question) == (0 if fits else -1)


def test_a_long_question_and_a_long_list_take_no_time():
    rules = [{"begins": [f"{number} {word} " + "a" * 190 for word in "abcd"], "budget": 1} for number in range(64)]
    assert find_rule(TokenRecoveryConfig(rules=rules).rules, "63 d " + "a" * 1_000_000) == -1
    assert find_rule(rules, "63 d " + "a" * 190 + " b" * 500_000) == 63


def test_each_rule_is_a_whole_section():
    section = TokenRecoveryConfig(budget=16, method="random", method_options={"seed": 3}, rules=RULES)
    assert [settings.budget for settings in section.all_settings] == [16, 32, 8, 4]
    assert section.of_rule(0) == TokenRecoveryConfig(
        method="random", method_options={"seed": 3}, budget=32, text_share=1.0
    )
    assert section.of_rule(1) == TokenRecoveryConfig(method="trim", budget=8)  # no options of another method
    assert section.of_rule(-1) == section.replace({"rules": []}) != section
    assert not any(settings.rules for settings in section.all_settings)
    plain = TokenRecoveryConfig(budget=16)
    assert plain.all_settings == (plain,)


def test_a_section_with_rules_is_read_written_compared_and_copied():
    section = TokenRecoveryConfig(budget=16, rules=RULES)
    written = json.loads(json.dumps(section.to_dict()))
    assert written["rules"] == RULES
    assert "rules" not in TokenRecoveryConfig(rules=[]).to_dict()
    for other in (TokenRecoveryConfig(**written), copy.deepcopy(section), pickle.loads(pickle.dumps(section))):
        assert other == section
        assert other.of_rule(1) == section.of_rule(1)
    assert TokenRecoveryConfig(budget=16, rules=RULES[:2]) != section
    assert TokenRecoveryConfig(budget=16, rules=tuple(RULES)) == section
    with pytest.raises(AttributeError, match="cannot be changed in place"):
        section.rules = []


@pytest.mark.parametrize("value", [{}, "", 0, False])
def test_only_a_list_is_a_list_of_no_rules(value):
    assert TokenRecoveryConfig(rules=()) == TokenRecoveryConfig()
    with pytest.raises(ValueError, match=r"token_recovery\.rules must be a list"):
        TokenRecoveryConfig(rules=value)


def test_saving_reads_the_rules_again():
    section = TokenRecoveryConfig(budget=16, rules=RULES)
    section.rules[0]["budget"] = 5
    assert section.to_dict()["rules"][0]["budget"] == section.of_rule(0).budget == 5
    section.rules[0]["budget"] = 0
    with pytest.raises(ValueError, match=r"token_recovery\.rules\[0\]\.budget must be"):
        section.to_dict()
    section.rules.clear()
    assert "rules" not in section.to_dict()
    assert section.all_settings == (section,)


def test_a_field_that_rules_could_change_sets_them_aside():
    section = TokenRecoveryConfig(budget=16, rules=RULES)
    for fields in ({"budget": 3}, {"method": "visual"}, {"text_share": 0.5, "newlines": "none"}):
        assert not section.replace(fields).rules
        assert section.replace({**fields, "rules": RULES[:1]}).rules == RULES[:1]
    for fields in ({}, {"position_ids": "original"}, {"newlines": "none"}, {"enabled": False}):
        assert section.replace(fields).rules == RULES
    original = section.replace({"position_ids": "original"})
    assert {settings.position_ids for settings in original.all_settings} == {"original"}
    assert not section.replace({"rules": []}).rules


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("how many", r"token_recovery\.rules must be a list of .*, got 'how many'"),
        ({"begins": "a", "budget": 3}, r"token_recovery\.rules must be a list"),
        ([3], r"rules\[0\] must be a mapping .*, got 3"),
        ([{"budget": 3}], r'rules\[0\] needs "begins"'),
        ([RULES[0], {"begins": "a"}], r"rules\[1\] changes no field"),
        ([{"begins": "a", "budget": 0}], r"^token_recovery\.rules\[0\]\.budget must be null, an int >= 1"),
        (
            [{"begins": "a", "bugdet": 3}],
            r"'bugdet' in token_recovery\.rules\[0\]; did you mean 'budget'",
        ),
        (
            [{"begins": "a", "xyz": 3}],
            r"Unknown field 'xyz' in .*rules\[0\]; a rule may have begins, meth",
        ),
        *(
            ([{"begins": "a", name: value}], rf"rules\[0\]\.{name} cannot be set by a rule")
            for name, value in (
                *(("version", 1), ("enabled", False), ("position_ids", "compact"), ("newlines", "none")),
                *(("rules", []), ("text_encoder_config", None)),
            )
        ),
        ([{"begins": [], "budget": 3}], r"rules\[0\]\.begins must be a text or a list of texts, got \[\]"),
        ([{"begins": 3, "budget": 3}], r"rules\[0\]\.begins must be a text or a list of texts, got 3"),
        ([{"begins": ["a", None], "budget": 3}], r"rules\[0\]\.begins must be a text or a list"),
        ([{"begins": " ?!", "budget": 3}], r"rules\[0\]\.begins must contain a letter or a digit, got ' \?!'"),
        ([{"begins": "a" * 201, "budget": 3}], r"rules\[0\]\.begins may have 200 characters, got 201"),
        ([{"begins": "a", "budget": 3}] * 65, r"token_recovery\.rules may have 64 rules, got 65"),
        ([{"begins": ["a"] * 257, "budget": 3}], r"may have 256 beginnings together, got 257"),
        ([{"begins": "a", "method": "nope"}], r"Unknown token_recovery\.rules\[0\]\.method 'nope'"),
        ([{"begins": "a", "method": "random", "budget": None}], r"rules\[0\]: method 'random' needs a budget"),
        ([{"begins": "a", "method": "authors"}], r"rules\[0\]: method 'authors' fixes the number of tokens"),
        ([{"begins": "a", "method_options": {"x": 1}}], r"Unknown token_recovery\.rules\[0\]\.method_options 'x'"),
        ([{"begins": "a", "text_share": 2}], r"^token_recovery\.rules\[0\]\.text_share must be a number in \[0, 1\]"),
        ([{"begins": "a", "budget": float("nan")}], r"token_recovery\.rules must be plain JSON with finite numbers"),
    ],
)
def test_malformed_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        TokenRecoveryConfig(budget=16, rules=rules)
    with pytest.raises(ValueError, match=message):
        TokenRecoveryConfig(budget=16).replace({"rules": rules})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"budget": tiny.PATCHES + 1},
            r"rules\[0\]\.budget is 101, but an image has only 100 patches",
        ),
        ({"visual_layer": -9}, r"token_recovery\.rules\[0\]\.visual_layer is -9, but the vision tower has only 4"),
    ],
)
def test_a_rule_that_does_not_fit_the_model(fields, message):
    with pytest.raises(ValueError, match=message):
        LLAVA.build(rules=[{"begins": "a", **fields}])


# ---- the processor -------------------------------------------------------------------------------------------------


@each_architecture
def test_the_processor_writes_the_rule_of_every_row(architecture):
    processor, picture = architecture.processor(), tiny.pictures(1)[0]
    prompts = [prompt_of(text, images) for text, images in (("Is there a cat?", 1), ("How many?", 0), ("Who?", 1))]
    call = {"images": [picture, picture], "text": prompts, "padding": True, "return_tensors": "pt"}
    assert "recovery_rule" not in processor(**call)
    assert processor(**call, recovery_rules=RULES)["recovery_rule"].tolist() == [1, 0, -1]
    processor.recovery_rules = RULES
    encoded = processor(**call)
    assert encoded["recovery_rule"].dtype == torch.int64
    assert encoded["recovery_rule"].tolist() == [1, 0, -1]
    assert set(encoded) <= {*processor.model_input_names, "image_sizes"}
    assert "recovery_rule" not in processor(**call, recovery_rules=[])
    given = processor(**call, recovery_text=["How many?", ["How many?", "Is there?"], "What?"])
    assert given["recovery_rule"].tolist() == [0, 1, -1]
    assert processor(images=[picture], text=prompts[0])["recovery_rule"] == [1]
    assert processor.encode_questions(["How?", ["How many?"]])["recovery_rule"].tolist() == [2, 0]
    with pytest.raises(ValueError, match="must be a list"):
        processor(**call, recovery_rules="how many")
    with pytest.raises(ValueError, match="must be a list"):
        processor.recovery_rules = None


@pytest.mark.parametrize("turns", ["last", "all"])
def test_the_last_question_of_a_chat_decides(turns):
    processor = LLAVA.processor(recovery_turns=turns)
    chat = [
        tiny.turn("user", "How many cats?", tiny.pictures(1)),
        tiny.turn("assistant", "Two."),
        tiny.turn("user", "Is there a dog?"),
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for arguments in ({"processor_kwargs": {"recovery_rules": RULES}}, {"recovery_rules": RULES}):
        assert processor.apply_chat_template(chat, **options, **arguments)["recovery_rule"].tolist() == [1]
    assert "recovery_rule" not in processor.apply_chat_template(chat, **options)


def test_a_processor_without_a_text_encoder_reads_rules_too():
    processor = LLAVA.processor(recovery_tokenizer=None)
    processor.recovery_rules = RULES
    call = {"images": tiny.pictures(1), "return_tensors": "pt"}
    encoded = processor(text=prompt_of("How many?", 1), **call)
    assert encoded["recovery_rule"].tolist() == [0]
    assert "recovery_input_ids" not in encoded
    assert processor(text=prompt_of("", 1), **call)["recovery_rule"].tolist() == [-1]
    chat = [tiny.turn("user", "Is there a dog?", tiny.pictures(1))]
    encoded = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert encoded["recovery_rule"].tolist() == [1]


def test_a_checkpoint_keeps_its_rules(tmp_path):
    model, processor = LLAVA.build(budget=16, rules=RULES), LLAVA.processor()
    processor.recovery_rules = RULES
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["token_recovery"]
    assert stored["rules"] == RULES
    assert "recovery_rules" not in (tmp_path / "processor_config.json").read_text()
    loaded = reccomp_hf.LlavaRecCompForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.token_recovery == model.config.token_recovery
    assert LlavaRecCompProcessor.from_pretrained(tmp_path).recovery_rules == RULES
    stored["rules"][0]["begins"] = []
    fields = json.loads((tmp_path / "config.json").read_text()) | {"token_recovery": stored}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for cls in (reccomp_hf.LlavaRecCompConfig, LlavaRecCompProcessor):
        with pytest.raises(ValueError, match=r"rules\[0\]\.begins must be a text"):
            cls.from_pretrained(tmp_path)
