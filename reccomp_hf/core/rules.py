"""Rules by question: the beginnings of questions for which other settings hold.

A rule compares plain beginnings, so that no text can make it slow. The processor finds the rule of every row
(`recovery_rule`), the model applies it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from .settings import FIELDS, did_you_mean, shown

NO_RULE = -1
"""The `recovery_rule` of a row that no rule fits."""
BEGINS = "begins"
MOST_RULES, MOST_BEGINNINGS, LONGEST_BEGINNING = 64, 256, 200
"""Limits of a section: rules, beginnings of all rules together, characters of one."""

_OF_ALL_ROWS = {"version", "enabled", "position_ids", "newlines", "rules", "text_encoder_config"}
CHANGED_BY_RULES = frozenset(FIELDS) - _OF_ALL_ROWS
"""Fields that a rule may change."""


def find_rule(rules: Sequence[Mapping[str, Any]], question: str | Sequence[str]) -> int:
    """The first rule that fits a question.

    Both texts are compared without case, in Unicode's compatibility form (NFKC), with single spaces for white space,
    and without what stands before the first letter or digit. A beginning must end where a word ends: "how many" does
    not fit "how manyfold". In writing without spaces (Chinese, Japanese, Thai) words may end anywhere.

    Args:
        rules: `rules` of a section.
        question: The question; of several the last.

    Returns:
        Its index; `NO_RULE` (-1) if none fits.
    """
    text = question if isinstance(question, str) else (question[-1] if question else "")
    text = plain_question(text)
    for number, rule in enumerate(rules):
        if any(_begins(text, plain_question(beginning)) for beginning in beginnings(rule)):
            return number
    return NO_RULE


def rule_text(rule: Mapping[str, Any]) -> str:
    """A rule on one line: its beginnings, and the fields that it changes, as JSON values."""
    changed = [f"{name} {json.dumps(value)}" for name, value in rule.items() if name != BEGINS]
    return f"{', '.join(map(json.dumps, beginnings(rule)))}: {', '.join(changed)}"


def check_rules(rules: Any) -> None:
    """Check the beginnings of rules, and which fields they change.

    Raises:
        ValueError: Not a list of rules, a beginning that is empty or too long, or too many of them.
    """
    if not isinstance(rules, list | tuple):
        raise ValueError(
            f'token_recovery.rules must be a list of {{"begins": ..., field: value}}, got {shown(rules)}.'
        )
    if len(rules) > MOST_RULES:
        raise ValueError(f"token_recovery.rules may have {MOST_RULES} rules, got {len(rules)}.")
    count = 0
    for number, rule in enumerate(rules):
        where = f"token_recovery.rules[{number}]"
        if not isinstance(rule, Mapping):
            raise ValueError(f'{where} must be a mapping {{"begins": ..., field: value}}, got {shown(rule)}.')
        if BEGINS not in rule:
            raise ValueError(f'{where} needs "begins", the beginnings of its questions, got {shown(rule)}.')
        _check_beginnings(f"{where}.{BEGINS}", rule[BEGINS])
        count += len(beginnings(rule))
        if len(rule) == 1:
            raise ValueError(f'{where} changes no field: add one, for example "budget", or leave the rule out.')
        for name in rule:
            _check_name(where, name)
    if count > MOST_BEGINNINGS:
        raise ValueError(f"token_recovery.rules may have {MOST_BEGINNINGS} beginnings together, got {count}.")


def read_rules(section: Any) -> None:
    """Validate the rules of a section, and keep the section that holds under each.

    Args:
        section: A `TokenRecoveryConfig`, valid but for its rules.

    Raises:
        ValueError: A rule is malformed, or the section would not be valid with its fields; the message names it.
    """
    own = vars(section)
    if isinstance(section.rules, list | tuple) and not section.rules:
        for name in ("_rules_read", "_without_rules", "_of_rules"):
            own.pop(name, None)
        return
    text = json.dumps([own[name] for name in FIELDS])
    if own.get("_rules_read") == text:
        return
    check_rules(section.rules)
    fields = {name: own[name] for name in FIELDS if name != "rules"}
    common, found = type(section)(**fields), []
    for number, rule in enumerate(section.rules):
        where = f"token_recovery.rules[{number}]"
        try:
            found.append(common.replace({name: value for name, value in rule.items() if name != BEGINS}))
        except ValueError as error:
            message = str(error).replace("token_recovery.", f"{where}.")
            raise ValueError(message if where in message else f"{where}: {message}") from error
    own.update(_without_rules=common, _of_rules=tuple(found), _rules_read=text)


def _check_beginnings(where: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} must be a text or a list of texts, got {shown(value)}.")
    for text in texts:
        if len(text) > LONGEST_BEGINNING:
            raise ValueError(f"{where} may have {LONGEST_BEGINNING} characters, got {len(text)}: {shown(text)}.")
        if not plain_question(text):
            raise ValueError(f"{where} must contain a letter or a digit, got {shown(text)}.")


def _check_name(where: str, name: Any) -> None:
    if name in _OF_ALL_ROWS:
        raise ValueError(f"{where}.{name} cannot be set by a rule: it holds for all rows. Set token_recovery.{name}.")
    if name != BEGINS and name not in CHANGED_BY_RULES:
        known = sorted({BEGINS, *CHANGED_BY_RULES}, key=lambda known: FIELDS.index(known) if known in FIELDS else -1)
        hint = did_you_mean(name, known, f"a rule may have {', '.join(known)}.")
        raise ValueError(f"Unknown field {name!r} in {where}; {hint}")


def beginnings(rule: Mapping[str, Any]) -> Sequence[str]:
    """The beginnings of a rule's questions, at least one."""
    return [rule[BEGINS]] if isinstance(rule[BEGINS], str) else rule[BEGINS]


def plain_question(text: str) -> str:
    """A text as it is compared."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start = next((place for place, character in enumerate(text) if character.isalnum()), len(text))
    return text[start:]


def _begins(text: str, beginning: str) -> bool:
    """Whether a text begins with another one, and a word ends there."""
    if not text.startswith(beginning):
        return False
    last, following = beginning[-1], text[len(beginning) : len(beginning) + 1]
    if not following or not in_word(last):
        return True
    if unicodedata.category(following)[0] == "M":  # an accent on the last letter
        return False
    return not following.isalnum() or (is_unspaced(last) and is_unspaced(following))


def in_word(character: str) -> bool:
    """Whether a character is a letter, a digit, or a mark on one, as the vowels of Devanagari."""
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def is_unspaced(character: str) -> bool:
    """Whether a letter belongs to writing that has no spaces between words."""
    scripts = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return unicodedata.name(character, "").startswith(scripts)


__all__ = [
    "BEGINS",
    "CHANGED_BY_RULES",
    "NO_RULE",
    "beginnings",
    "check_rules",
    "find_rule",
    "in_word",
    "is_unspaced",
    "plain_question",
    "read_rules",
    "rule_text",
]
