"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
"""Cells by row, the header first; all rows are equally long."""


def markdown_table(rows: Rows) -> list[str]:
    """Lines of a Markdown table with aligned columns."""
    widths = _widths(rows)
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def plain_table(rows: Rows) -> list[str]:
    """Lines of aligned columns, the first to the left and the others to the right."""
    first, *others = _widths(rows)
    return ["  ".join(["  " + row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows]


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


__all__ = ["Rows", "markdown_table", "plain_table"]
