"""The table of speeds as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tables import markdown_table
from .choices import choices_table
from .contenders import OURS, STOCK
from .environment import describe_environment
from .reporting import format_milliseconds, format_ratio
from .speed import CONTENDERS, GRAPHED, OURS_GRAPHED, RATIOS


def speed_markdown(facts: Mapping[str, Any]) -> str:
    """The results of `speed_report`, whole or begun, as a page of Markdown."""
    lines = [
        "# Speed",
        "",
        f"Written by `reccomp-hf bench --report` in {facts['seconds']:.0f} s. {describe_environment(facts)}.",
        *_section(
            "Prefills",
            "Medians of all rounds in milliseconds; ratios within a round, in brackets their quartiles.",
            _prefills(facts),
        ),
        *_section(
            "Graphs",
            "The first prefill records the graphs; memory is what the allocator keeps for them. Logits of ours with "
            "graphs differ from the eager ones by at most that many standard deviations.",
            _graphs(facts),
        ),
        *_section(
            "Whole answers",
            "Answers per second by `generate`, the faster of two calls after a first one, which compiles and records.",
            _answers(facts),
        ),
        *_section("Launches", f"Launches of a prefill: {facts['launches_are']}.", _launches(facts)),
        *_section(
            "Choice of tokens",
            "Medians of all rounds and launches: with Triton kernels where there is a GPU, step by step, and with "
            "kernels as a CUDA graph.",
            choices_table(facts["choices"]),
        ),
        *_section("Largest batches", "Rows that fit, and tokens per second of their decoding.", _largest(facts)),
    ]
    return "\n".join([*lines, *(line for note in _notes(facts) for line in ("", note))]) + "\n"


def _section(heading: str, text: str, table: list[list[str]]) -> list[str]:
    """A heading, a line and a table; nothing without rows."""
    return ["", f"## {heading}", "", text, "", *markdown_table(table)] if len(table) > 1 else []


def _prefills(facts: Mapping[str, Any]) -> list[list[str]]:
    names = list(CONTENDERS)
    table = [["case", "batch", *names, *(f"{one} / {other}" for one, other in RATIOS)]]
    for row in facts["prefills"]:
        cells = [format_milliseconds(row["prefill"].get(name)) for name in names]
        ratios = [format_ratio(row["ratios"][f"{one} / {other}"]) for one, other in RATIOS]
        table.append([row["case"], str(row["batch_size"]), *cells, *ratios])
    return table


def _graphs(facts: Mapping[str, Any]) -> list[list[str]]:
    table = [["case", "batch", "graphs", "first prefill of ours with graphs, s", "memory, MB", "logits"]]
    for row in facts["prefills"]:
        first = row["first_prefill"].get(OURS_GRAPHED)
        cost = ["-", "-"] if first is None else [f"{first['seconds']:.2f}", f"{first['bytes'] * 1e-6:,.0f}"]
        difference = "-" if row["logits"] is None else f"{row['logits']:.2g}"
        table.append([row["case"], str(row["batch_size"]), str(row["graphs"]), *cost, difference])
    return table


def _answers(facts: Mapping[str, Any]) -> list[list[str]]:
    ways = list(dict.fromkeys(way for row in facts["answers"] for way in row["rates"]))
    table = [["case", "batch", "new tokens", *ways]]
    for row in facts["answers"]:
        cells = [f"{row['rates'][way]:.2f}" if way in row["rates"] else "-" for way in ways]
        table.append([row["case"], str(row["batch_size"]), str(row["new_tokens"]), *cells])
    return table


def _launches(facts: Mapping[str, Any]) -> list[list[str]]:
    table = [["case", "batch", *CONTENDERS]]
    for row in facts["launches"]:
        table.append([row["case"], str(row["batch_size"]), *(str(row["launches"][name]) for name in CONTENDERS)])
    return table


def _largest(facts: Mapping[str, Any]) -> list[list[str]]:
    table = [["case", *(f"{name}: {what}" for name in (STOCK, OURS) for what in ("rows", "tokens per second"))]]
    for row in facts["largest_batches"]:
        cells = [row["case"]]
        for name in (STOCK, OURS):
            speed = row[name]["tokens_per_second"]
            cells += [str(row[name]["batch_size"]), "-" if speed is None else f"{speed:.0f}"]
        table.append(cells)
    return table


def _notes(facts: Mapping[str, Any]) -> list[str]:
    notes = []
    if not facts["environment"]["cuda"]:
        notes.append(f"There was no GPU: {GRAPHED} were not recorded, and those columns ran eagerly.")
    else:
        notes += [
            f"Answers by CUDA graphs in float32 that equal the eager ones: {same['equal']} of {same['questions']} "
            "questions on drawn scenes."
            for same in facts["equal_answers"]
        ]
    rows = [*facts["prefills"], *facts["answers"], *facts["equal_answers"]]
    refusals = dict.fromkeys(refusal for row in rows for refusal in row["refusals"])
    notes += [f"Without a CUDA graph ran the {refusal}." for refusal in refusals]
    notes += [
        f"Recorded again while it was timed: {row['case']}, batch {row['batch_size']} ({row['recorded_anew']} times)."
        for row in facts["prefills"]
        if row["recorded_anew"]
    ]
    failed = [
        f"{name} of {row['case']}, batch {row['batch_size']}: {reason}"
        for row in (*facts["prefills"], *facts["answers"], *facts["choices"])
        for name, reason in row["failed"].items()
    ]
    notes += [f"Failed: {line}." for line in (*failed, *facts["failed"])]
    if facts["left_out"]:
        notes.append(f"Left out for want of time: {'; '.join(facts['left_out'])}.")
    return notes


__all__ = ["speed_markdown"]
