"""The package speaks plain, idiomatic English: words and openings that it does not use."""

import ast
import re
import tokenize
from pathlib import Path

import reccomp_hf

PACKAGE = Path(reccomp_hf.__file__).parent
FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]

PHRASES = {
    r"\btold\b": "reported",
    r"\bbeside\b": "next to, or along with",
    r"\banew\b": "again",
    r"\bso many(th|eth)?\b(?! (that|as)\b)": "the number, or `n`",
    r"\b(goes|go|went|going) on\b": "continues, or resumes",
    r"(?<!here )\b(is|are|was) no (?!longer\b|more\b|need\b)": "is not a",
    r"\b(can|could|cannot|to|may) be had\b": "obtained",
    r"\bnone of (a|an)\b": "not a",
    r"\bone's own\b": "your own",
}
OPENING = re.compile(r"\s*(What|Of|How many)\b(?!.*\?)")
ENTRY = re.compile(r"\s{4,}`?[\w*]+`?: (What|Of|Its|How many|Whose)\b")


def texts(path: Path) -> list[tuple[int, str]]:
    """Docstrings, other strings and comments of a file with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    with path.open("rb") as file:
        comments = [(token.start[0], token.string) for token in tokenize.tokenize(file.readline)]
    return strings + [(line, text) for line, text in comments if text.startswith("#")]


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Strings that stand as statements: docstrings of modules, classes, functions and constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def test_plain_words():
    found = [
        f"{name}:{line}: {match[0]!r}, write {better}"
        for name in FILES
        for line, text in texts(PACKAGE / name)
        for phrase, better in PHRASES.items()
        for match in re.finditer(phrase, text)
    ]
    assert not found, "\n".join(found)


def test_docstrings_say_what_a_thing_is_or_does():
    found = [
        f"{name}:{line}: {entry.strip()[:60]!r}"
        for name in FILES
        for line, text in docstrings(PACKAGE / name)
        for entry in text.splitlines()
        if ENTRY.match(entry) or (entry is text.splitlines()[0] and OPENING.match(entry))
    ]
    assert not found, "\n".join(found)
