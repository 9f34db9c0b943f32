"""The report of `reccomp-hf demo`: a table and a sentence."""

from __future__ import annotations

import itertools
import textwrap
from typing import Any

from .image_questions import DEFAULT_SEED

_WIDEST_CELLS = (32, 10, 11, 13, 29)


def report(facts: dict[str, Any]) -> str:
    """The result of `compare` as a table of at most 100 columns and a sentence."""
    answers = facts["answers"]
    known = any(answer["expected"] for answer in answers)
    rows = [["question", "expected", "compressed", "uncompressed", f"visual tokens of {answers[0]['tokens']['of']}"]]
    for answer in answers:
        words = [answer["question"], answer["expected"] or "-", answer["compressed"], answer["uncompressed"]]
        rows.append([*words, _sum(answer["tokens"])])
    columns = [0, 1, 2, 3, 4] if known else [0, 2, 3, 4]
    rows = [[row[column] for column in columns] for row in rows]
    lines = _table(rows, [_WIDEST_CELLS[column] for column in columns])
    lines += ["", "Tokens: salient in the image + recovered for the question + spread for coverage + merged = total"]
    lines += ["", *textwrap.wrap(_sentence(facts, known), 100)]
    lines += [f"Wrote {facts['output']}: the image under each question, with the patches that were read."]
    lines += ["This model is too small to save time; `reccomp-hf bench` measures that on larger ones."]
    lines += ["Next: README.md, and `reccomp-hf convert --help` for a LLaVA-1.5 or LLaVA-NeXT of your own."]
    return "\n".join(lines)


def _sum(tokens: dict[str, Any]) -> str:
    parts = " + ".join(f"{tokens[name]:>2}" for name in ("visual", "text", "coverage", "merged"))
    return f"{parts} = {tokens['total']:>2} ({tokens['share']:.0%})"


def _table(rows: list[list[str]], widest: list[int]) -> list[str]:
    """Rows as aligned lines; a cell that is too wide is wrapped."""
    cells = [[textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widest, strict=True)] for row in rows]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(widest))]
    lines = []
    for number, row in enumerate(cells):
        for pieces in itertools.zip_longest(*row, fillvalue=""):
            padded = (piece.ljust(width) for piece, width in zip(pieces, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines


def _sentence(facts: dict[str, Any], known: bool) -> str:
    answers = facts["answers"]
    totals, patches = [answer["tokens"]["total"] for answer in answers], answers[0]["tokens"]["of"]
    number = f"{min(totals)}" if min(totals) == max(totals) else f"{min(totals)} to {max(totals)}"
    share = sum(totals) / len(totals) / patches
    same = sum(answer["compressed"] == answer["uncompressed"] for answer in answers)
    sentence = (
        f"Reading {number} of {patches} visual tokens ({share:.0%}), the compressed model gave the uncompressed "
        f"model's answer to {same} of {len(answers)} questions"
    )
    if known:
        checkable = [answer for answer in answers if answer["expected"]]
        right, full = (sum(a[name] == a["expected"] for a in checkable) for name in ("compressed", "uncompressed"))
        sentence += f", and the expected one to {right} of {len(checkable)} (uncompressed: {full})"
    if facts["seed"] is None:
        return f"{sentence}. This small model knows drawn shapes only; it does not understand other images."
    if known and facts["seed"] == DEFAULT_SEED and right == full == len(checkable):
        return f"{sentence}. This scene was chosen because both do well on it; for others use --seed 1000001 and up."
    return f"{sentence}."


__all__ = ["report"]
