"""The table of speeds as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tables import markdown_table
from .environment import describe_environment
from .reporting import format_milliseconds, format_ratio
from .speed import CONTENDERS, GRAPHED, OURS_GRAPHED, RATIOS


def speed_markdown(facts: Mapping[str, Any]) -> str:
    """The results of `speed_report` as a page of Markdown."""
    lines = [
        "# Speed",
        "",
        f"Written by `reccomp-hf bench --report` in {facts['seconds']:.0f} s. {describe_environment(facts)}.",
        "",
        "## Prefills",
        "",
        f"Medians of {facts['rounds']} rounds in milliseconds; ratios within a round, in brackets their quartiles.",
        "",
        *markdown_table(_prefills(facts)),
        "",
        f"Launches of a prefill: {facts['launches_are']}. The first prefill records the graphs; memory is what the "
        "allocator keeps for them.",
        "",
        *markdown_table(_counts(facts)),
        "",
        "## Whole answers",
        "",
        "Answers per second by `generate`, the faster of two calls after a first one, which compiles and records.",
        "",
        *markdown_table(_answers(facts)),
    ]
    return "\n".join([*lines, *(line for note in _notes(facts) for line in ("", note))]) + "\n"


def _prefills(facts: Mapping[str, Any]) -> list[list[str]]:
    names = list(CONTENDERS)
    table = [["case", "batch", *names, *(f"{one} / {other}" for one, other in RATIOS)]]
    for row in facts["rows"]:
        cells = [format_milliseconds(row["prefill"].get(name)) for name in names]
        ratios = [format_ratio(row["ratios"][f"{one} / {other}"]) for one, other in RATIOS]
        table.append([row["case"], str(row["batch_size"]), *cells, *ratios])
    return table


def _counts(facts: Mapping[str, Any]) -> list[list[str]]:
    table = [["case", "batch", *CONTENDERS, "graphs", "first prefill of ours with graphs, s", "memory, MB"]]
    for row in facts["rows"]:
        found = [row["prefill"].get(name) for name in CONTENDERS]
        cells = ["-" if prefill is None else str(prefill["launches"]) for prefill in found]
        first = row["first_prefill"].get(OURS_GRAPHED)
        cost = ["-", "-"] if first is None else [f"{first['seconds']:.2f}", f"{first['bytes'] * 1e-6:,.0f}"]
        table.append([row["case"], str(row["batch_size"]), *cells, str(row["graphs"]), *cost])
    return table


def _answers(facts: Mapping[str, Any]) -> list[list[str]]:
    ways = list(dict.fromkeys(way for row in facts["rows"] for found in row["answers"].values() for way in found))
    table = [["case", "batch", "new tokens", *ways]]
    for row in facts["rows"]:
        for count, found in row["answers"].items():
            speeds = [found.get(way) for way in ways]
            cells = ["-" if speed is None else f"{speed:.2f}" for speed in speeds]
            table.append([row["case"], str(row["batch_size"]), count, *cells])
    return table


def _notes(facts: Mapping[str, Any]) -> list[str]:
    notes = []
    if not facts["environment"]["cuda"]:
        notes.append(f"There was no GPU: {GRAPHED} were not recorded, and those columns ran eagerly.")
    elif same := facts.get("equal_answers"):
        notes.append(
            f"Answers by CUDA graphs in float32 that equal the eager ones: {same['equal']} of {same['questions']} "
            "questions on drawn scenes."
        )
    if facts["left_out"]:
        notes.append(f"Left out for want of time: {'; '.join(facts['left_out'])}.")
    return notes


__all__ = ["speed_markdown"]
