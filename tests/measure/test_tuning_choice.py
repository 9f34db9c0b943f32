"""Plans are chosen by hand-made measurements: one setting for all, or one for each kind of question."""

import types
import unicodedata

import numpy as np
import pytest

import reccomp_hf
from reccomp_hf.core.rules import MOST_RULES, find_rule
from reccomp_hf.measure.evaluation import parse_setting
from reccomp_hf.measure.tuning.choosing import (
    SHRINKAGE,
    Plan,
    Scores,
    cheapest,
    closest,
    plans_by_group,
    survivors,
    within,
)
from reccomp_hf.measure.tuning.goal import COMMON, RULES, Goal
from reccomp_hf.measure.tuning.kinds import beginning
from reccomp_hf.measure.tuning.result import section_of


def scores(divergence, tokens, agrees=None):
    divergence = np.array(divergence, float)
    tokens = np.broadcast_to(np.array(tokens, float)[:, None], divergence.shape)
    agrees = np.ones_like(divergence) if agrees is None else np.array(agrees, float)
    return Scores(tuple("abcdefgh"[: len(divergence)]), divergence, agrees, tokens)


def test_a_group_is_shrunk_toward_all_questions():
    """Setting b is better by d for the group's n questions, and worse for the others: n d against m times the rest."""
    for count, differs in ((6, False), (60, True)):
        others = 100
        group = ["how many"] * count + ["what color"] * others
        gain, loss = 0.1, 0.1
        table = scores(
            [[0.2] * (count + others), [0.2 - gain] * count + [0.2 + loss] * others],
            [8, 8],
        )
        mean = (others * loss - count * gain) / (count + others)
        assert (count * gain > SHRINKAGE * mean) == differs  # what shrinkage says by hand
        plan, *_ = plans_by_group(table, group, "a")
        assert plan == Plan("a", {"how many": "b"} if differs else {})


def test_groups_that_are_too_small_keep_the_common_setting():
    group = ["how many"] * 4 + ["what color"] * 4 + ["is there"] * 40
    table = scores([[0.9] * 8 + [0.1] * 40, [0.0] * 8 + [0.2] * 40], [8, 8])
    plans = plans_by_group(table, group, "b")
    assert all(plan.setting("how many") == plan.setting("what color") == plan.common == "b" for plan in plans)


def test_a_mean_number_of_tokens_is_spent_where_it_helps():
    """Counting needs 16 tokens, colours do with 4: at a mean of 10 each group gets its own budget."""
    group = ["how many"] * 50 + ["what color"] * 50
    table = scores([[0.8] * 50 + [0.1] * 50, [0.4] * 50 + [0.09] * 50, [0.1] * 50 + [0.08] * 50], [4, 10, 16])
    plans = plans_by_group(table, group, "b")
    plan = within(plans, table, group, 10)
    assert {key: plan.setting(key) for key in ("how many", "what color")} == {"how many": "c", "what color": "a"}
    assert table.of_plan(plan, group).tokens.mean() == 10
    assert plan.setting("is there") == "b"  # as many tokens as were asked for, where the data says nothing
    means = [table.of_plan(plan, group).tokens.mean() for plan in plans]
    divergences = [table.of_plan(plan, group).divergence.mean() for plan in plans]
    assert means == sorted(means, reverse=True) and divergences == sorted(divergences)
    assert within(plans, table, group, 1) == plans[-1]  # nothing fits: the fewest


@pytest.mark.parametrize(
    ("goal", "common"),
    [({"budget": 10}, "b"), ({"average": 10}, "b"), ({"agreement": 0.9}, "c"), ({"frontier": True}, None)],
)
def test_rules_leave_other_questions_the_setting_for_all(goal, common):
    """Counting needs 16 tokens, the rest does with 4: a question of another kind must get neither of them."""
    group = ["how many"] * 50 + ["what color"] * 50
    divergence = [[0.8] * 50 + [0.1] * 50, [0.4] * 50 + [0.09] * 50, [0.1] * 50 + [0.08] * 50]
    agrees = [[0] * 50 + [1] * 50, [0] * 50 + [1] * 50, [1] * 100]
    table, budgets = scores(divergence, [4, 10, 16], agrees), {"a": 4, "b": 10, "c": 16}
    config = types.SimpleNamespace(token_recovery=reccomp_hf.TokenRecoveryConfig())
    folds = np.arange(100) % 2 == 0
    found = Goal(by_question=True, **goal).contenders(table, group, folds, budgets, config)
    rules = {name: plan for name, plan in found.items() if name.startswith(RULES)}
    assert rules or "budget" in goal  # of one setting at this budget no rules can be made
    for name, plan in rules.items():
        assert plan.common == found[name.replace(RULES, COMMON)].common
        assert common in (None, plan.common)
        assert table.of_plan(plan, group).tokens.mean() <= table.of_plan(Plan(plan.common), group).tokens.mean()


def each_setting(table, groups):
    return [Plan(name) for name in table.names]


def test_the_fewest_tokens_that_keep_a_share_of_the_answers():
    group, folds = ["all"] * 10, np.arange(10) % 2 == 0
    agrees = [[1] * 6 + [0] * 4, [1] * 8 + [0] * 2, [1] * 9 + [0]]
    table = scores(np.array([[0.3], [0.2], [0.1]]) * np.ones(10), [4, 8, 16], agrees)
    taken = [cheapest(each_setting, table, group, folds, share).common for share in (0.5, 0.7, 0.9, 0.99)]
    assert taken == ["a", "b", "c", "c"]


def test_a_share_that_is_kept_by_luck_does_not_count():
    """Of 7 settings that keep half of the answers at random, the best looks better than it is: not across folds."""
    rng = np.random.default_rng(0)
    agrees = np.concatenate([rng.integers(0, 2, (7, 30)), np.ones((1, 30), int)])
    table = scores(1.0 - agrees, [4] * 7 + [16], agrees)
    group, folds = ["all"] * 30, np.arange(30) % 2 == 0
    best = agrees[:7].mean(1).max()
    assert best > 0.65

    def best_of_budgets(table, groups):
        return [closest(table.some("abcdefg")), closest(table.some("h"))]

    assert best_of_budgets(table, group)[0].common == "abcdefg"[agrees[:7].mean(1).argmax()]
    assert cheapest(best_of_budgets, table, group, folds, best).common == "h"


def test_half_of_the_settings_of_a_budget_survive():
    table = scores(np.arange(8.0)[:, None] * np.ones((8, 3)), [4] * 8)
    assert survivors(table, [4, 4, 4, 4, 8, 8, 8, 8], 1) == ["a", "b", "e", "f"]
    assert survivors(table, [4] * 8, 6) == list("abcdef")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many objects are there?", "how many"),
        ('  "How   MANY, please"', "how many"),
        ("\nIs there a dog?", "is there"),
        ("Is it's colour red?", "is it"),
        ("What's this?", "what's this"),
        ("How many\u0301 dogs?", "how many\u0301"),
        ("क्या यहाँ कुत्ता है?", "क्या यहाँ"),
        ("What?", ""),
        ("Yes - or no?", ""),
        ("???", ""),
        ("ここに何人いますか", ""),
        ("OK ここに何人いますか", ""),
        ("what " + "w" * 200, ""),
    ],
)
def test_a_kind_of_question_is_its_first_two_words(question, expected):
    assert beginning(question) == unicodedata.normalize("NFKC", expected)


def test_a_rule_fits_the_questions_of_its_group_alone():
    """Whatever the order of the rules: no group's words begin those of another one."""
    names = [f"balanced:{budget}" for budget in range(2, 9)]
    settings = {name: parse_setting(name).fields for name in names}
    questions = [
        *(
            "Why?",
            "Why is it?",
            "Why is-it?",
            "Why is it's",
            "Why isn't it?",
            "why, is it",
            "Why - is it?",
            "what's up",
        ),
        *(
            "What is it",
            "What isit",
            "what is",
            "What",
            "की मत",
            "की मती",
            "कीमत क्या",
            "??",
            "OK ここに",
            "OK ここ",
            "a1 2b",
        ),
    ]
    groups = [group for group in dict.fromkeys(map(beginning, questions)) if group]
    for shift in range(len(names)):
        order = groups[shift:] + groups[:shift]
        plan = Plan(names[0], {group: names[1 + row % 6] for row, group in enumerate(order)})
        section = reccomp_hf.TokenRecoveryConfig(**section_of(plan, settings))
        for question in questions:
            read = section.of_rule(find_rule(section.rules, question))
            assert read.budget == int(plan.setting(beginning(question)).partition(":")[2]), question


def test_questions_without_a_group_and_the_smaller_of_many_groups_have_the_common_setting():
    groups = [""] * 300
    for number in range(70):
        groups += [f"what {number:02}"] * (30 - number % 2)
    without = np.array([group == "" for group in groups])
    table = scores([np.where(without, 0.0, 0.5), np.where(without, 3.0, 0.2)], [8, 8])
    plan = plans_by_group(table, groups, "a")[0]
    assert plan.common == "a" and len(plan.groups) == 64 == MOST_RULES
    assert "" not in plan.groups
    assert {group for group in plan.groups if int(group[-2:]) % 2 == 0} == {f"what {n:02}" for n in range(0, 70, 2)}
    settings = {name: parse_setting(f"balanced:{size}").fields for name, size in (("a", 9), ("b", 12))}
    assert reccomp_hf.TokenRecoveryConfig(**section_of(plan, settings)).rules


def test_rules_hold_the_options_of_another_method():
    """Also where two methods have equal options: a section takes none over from another method."""
    options = {"neighbors": 16}
    sections = {
        "a": {"method": "prumerge", "method_options": options},
        "b": {"method": "prumerge_plus", "method_options": options},
        "c": {"method": "divprune"},
        "d": {"method": "scope"},
    }
    settings = {
        name: reccomp_hf.TokenRecoveryConfig(**fields, budget=9).overridable() for name, fields in sections.items()
    }
    for common in "abcd":
        groups = {f"what {name}": name for name in "abcd" if name != common}
        section = section_of(Plan(common, groups), settings)
        read = reccomp_hf.TokenRecoveryConfig(**section)
        for rule, name in zip(read.all_settings[1:], groups.values(), strict=True):
            assert rule.overridable() == settings[name]
    assert "method_options" not in section["rules"][2]  # divprune has none, and neither has scope


def test_rules_hold_what_differs_from_the_common_setting():
    """Also where another method would bring other defaults of the fields that are equal."""
    names = ["balanced:14", "divprune:14", "balanced:36", "cdpruner:14+text_relevance=value+text_relevance_sign=1"]
    settings = {name: {**parse_setting(name).fields, "position_ids": "original"} for name in names}
    groups = {"how many": names[2], "is there": names[1], "are there": names[1], "what color": names[3]}
    section = section_of(Plan("balanced:14", groups), settings)
    assert section["budget"] == 14
    assert section["rules"][0] == {"begins": ["how many"], "budget": 36}
    assert [rule["begins"] for rule in section["rules"]] == [["how many"], ["is there", "are there"], ["what color"]]
    read = reccomp_hf.TokenRecoveryConfig(**section)
    for rule, name in zip(read.all_settings[1:], (names[2], names[1], names[3]), strict=True):
        assert rule.overridable() == reccomp_hf.TokenRecoveryConfig(**settings[name]).overridable()
