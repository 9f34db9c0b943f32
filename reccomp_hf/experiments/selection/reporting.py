"""The results of the selection experiments as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...measure.benchmark.environment import describe_environment
from ...measure.benchmark.reporting import format_milliseconds, format_ratio
from ...measure.tables import plain_table


def choosing_text(facts: Mapping[str, Any]) -> str:
    """The results of `compare_choosing` for a reader."""
    settings, loops = facts["settings"], facts["loops"]
    head = ["setting", "batch", "tokens", "ms per image", *(f"{loop} / ours" for loop in loops)]
    rows = [
        [
            row["setting"],
            str(row["batch_size"]),
            f"{row['tokens']:.1f}",
            format_milliseconds(row["seconds_per_image"]),
            *(format_ratio(row["ratios"][loop]) for loop in loops),
        ]
        for row in facts["rows"]
    ]
    lines = [
        f"recover_tokens at ({settings['patches']}, {settings['width']}) on {describe_environment(facts)}",
        f"medians of {settings['rounds']} rounds by {settings['clock']}, in brackets the quartiles of ratios within a "
        "round",
        "",
        *plain_table([head, *rows]),
        "",
    ]
    for loop, entry in loops.items():
        time = format_milliseconds(entry["seconds_per_image"])
        lines.append(f"{loop}: {time} ms per image; it gives the tokens of setting {entry['same_tokens_as']}.")
    return "\n".join([*lines, "", *_method_lines(facts["methods"])])


def _method_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table of every method's time for one budget, and of the published loop where there is one."""
    names, size = ("all", "choosing", "batch", "loop"), found[0]["batch_size"]
    rows = [
        [
            row["method"],
            f"{row['tokens']:.1f}",
            *(format_milliseconds(row[name]) if name in row else "" for name in names),
        ]
        for row in found
    ]
    head = ["tokens", "ms in all", "ms to choose", f"batch {size}, per image", "published loop"]
    return plain_table([[f"budget {found[0]['budget']}, batch 1", *head], *rows])


def scaling_text(facts: Mapping[str, Any]) -> str:
    """The results of `measure_scaling` for a reader."""
    settings = facts["settings"]
    lines = [
        f"recover_tokens on {describe_environment(facts)}: exponents of its cost, over all sizes and over the "
        "upper half",
        f"medians of {settings['rounds']} rounds by {settings['clock']}",
    ]
    for axis, entry in facts["axes"].items():
        sizes = ", ".join(map(str, entry["sizes"]))
        known = f"; N log N would be {entry['n_log_n']:.2f}" if entry["n_log_n"] else ""
        rows = [
            [setting, *(_exponents(steps[step]) for step in facts["steps"])]
            for setting, steps in entry["settings"].items()
        ]
        lines += ["", f"{axis}: {sizes}{known}", *plain_table([["setting", *facts["steps"]], *rows])]
    return "\n".join([*lines, "", *(f"{name}: {what}." for name, what in facts["steps"].items())])


def _exponents(growth: Mapping[str, Any]) -> str:
    upper = growth["upper_exponent"]
    return f"{growth['exponent']:.2f}" + ("" if upper is None else f", {upper:.2f}")


__all__ = ["choosing_text", "scaling_text"]
