"""What the benchmarks found, for a reader: aligned tables and sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .contenders import ORACLE, OURS, STOCK
from .stages import REST, WHOLE

_MEASURES = {
    "prefill": "prefill, ms",
    "decode": "decoding a token, ms",
    "answer": "the whole answer, ms",
}
_SHOWN_RATIOS = {"stock / ours": (STOCK, OURS), "ours / oracle": (OURS, ORACLE)}


def comparison_text(name: str, facts: Mapping[str, Any]) -> str:
    """`compare`'s findings."""
    settings = facts["settings"]
    lines = [
        f"{name} on {where(facts)}",
        f"medians of {settings['rounds']} rounds by {settings['clock']}, in brackets the quartiles of ratios within a "
        f"round; answers of {settings['new_tokens']} tokens",
    ]
    for row in facts["rows"]:
        lines += ["", *_row_lines(row)]
    for which, found in (facts.get("largest_batches") or {}).items():
        speed = found["tokens_per_second"]
        decoded = "" if speed is None else f", which decodes {speed:,.0f} tokens a second"
        lines += ["", f"largest batch, {which}: {found['batch_size']}{decoded}"]
    lines += ["", "oracle: one whole pass of the vision tower, and the short prompt's embeddings for nothing."]
    return "\n".join([*lines, f"device reads: {facts['device_reads_are']}.", *facts["notes"]])


def choosing_text(facts: Mapping[str, Any]) -> str:
    """`compare_choosing`'s findings."""
    settings, loops = facts["settings"], facts["loops"]
    head = ["setting", "batch", "tokens", "ms per image", *(f"{loop} / ours" for loop in loops)]
    rows = [
        [
            row["setting"],
            str(row["batch_size"]),
            f"{row['tokens']:.1f}",
            _milliseconds(row["seconds_per_image"]),
            *(_ratio(row["ratios"][loop]) for loop in loops),
        ]
        for row in facts["rows"]
    ]
    lines = [
        f"recover_tokens at ({settings['patches']}, {settings['width']}) on {where(facts)}",
        f"medians of {settings['rounds']} rounds by {settings['clock']}, in brackets the quartiles of ratios within a "
        "round",
        "",
        *_table([head, *rows]),
        "",
    ]
    for loop, entry in loops.items():
        time = _milliseconds(entry["seconds_per_image"])
        lines.append(f"{loop}: {time} ms per image; it gives the tokens of setting {entry['same_tokens_as']}.")
    return "\n".join([*lines, "", *_method_lines(facts["methods"])])


def _method_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """How long every method takes for one budget."""
    rows = [
        [row["method"], f"{row['tokens']:.1f}", _milliseconds(row["choosing"]), _milliseconds(row["all"])]
        for row in found
    ]
    return _table([[f"budget {found[0]['budget']}, batch 1", "tokens", "ms to choose", "ms with merging"], *rows])


def scaling_text(facts: Mapping[str, Any]) -> str:
    """`measure_scaling`'s findings."""
    settings = facts["settings"]
    lines = [
        f"recover_tokens on {where(facts)}: exponents of its cost, over all sizes and over the upper half",
        f"medians of {settings['rounds']} rounds by {settings['clock']}",
    ]
    for axis, entry in facts["axes"].items():
        sizes = ", ".join(map(str, entry["sizes"]))
        known = f"; N log N would be {entry['n_log_n']:.2f}" if entry["n_log_n"] else ""
        rows = [
            [setting, *(_exponents(steps[step]) for step in facts["steps"])]
            for setting, steps in entry["settings"].items()
        ]
        lines += ["", f"{axis}: {sizes}{known}", *_table([["setting", *facts["steps"]], *rows])]
    return "\n".join([*lines, "", *(f"{name}: {what}." for name, what in facts["steps"].items())])


def where(facts: Mapping[str, Any]) -> str:
    """Device, dtype, threads and versions in a line."""
    found = facts["environment"]
    threads = "" if found["cuda"] else f", {found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return (
        f"{found['device']} ({found['device_name']}), {found['dtype']}{threads}; "
        f"torch {found['torch']}, transformers {found['transformers']}"
    )


def _row_lines(row: Mapping[str, Any]) -> list[str]:
    """One batch size and budget."""
    contenders = row["contenders"]
    shown = [[f"batch {row['batch_size']}, {_budget(row['budget'])}", *contenders, *_SHOWN_RATIOS]]
    for measure, label in _MEASURES.items():
        cells = [_milliseconds(facts and facts["seconds"][measure]) for facts in contenders.values()]
        ratios = [_ratio(row["ratios"][f"{measure}, {ratio}"]) for ratio in _SHOWN_RATIOS]
        shown.append([label, *cells, *ratios])
    counts = {
        "prompt tokens": [_cell(facts, "prompt_tokens", 1, ",.1f") for facts in contenders.values()],
        "visual tokens": [_cell(facts, "visual_tokens", 1, ",.1f") for facts in contenders.values()],
        "KV cache, MB": [_cell(facts, "kv_cache_bytes", 1e-6, ",.1f") for facts in contenders.values()],
        "peak beyond the weights, MB": [_memory(facts) for facts in contenders.values()],
        "device reads": [_cell(facts, "device_reads", 1, "d") for facts in contenders.values()],
    }
    shown += [[label, *cells, *_count_ratios(label, row)] for label, cells in counts.items()]
    stages = [
        f"{stage.replace('_', ' ')} {1e3 * seconds['median']:,.2f}"
        for stage, seconds in row["stages"].items()
        if stage not in (WHOLE, REST)
    ]
    rest = row["stages"].get(REST)
    stages += [f"{REST} {1e3 * rest['median']:,.2f}"] if rest and stages else []
    told = f"stages of ours under the profiler, ms: {', '.join(stages)}" if stages else ""
    return [*_table(shown), *textwrap.wrap(told, 110, initial_indent="  ", subsequent_indent="    ")]


def _count_ratios(label: str, row: Mapping[str, Any]) -> list[str]:
    """The cache's ratios; other counts have none worth a column."""
    if not label.startswith("KV"):
        return ["", ""]
    contenders, cells = row["contenders"], []
    for above, below in _SHOWN_RATIOS.values():
        pair = contenders[above], contenders[below]
        known = all(pair)
        cells.append(f"{pair[0]['kv_cache_bytes'] / pair[1]['kv_cache_bytes']:.2f}x" if known else "-")
    return cells


def _memory(facts: Mapping[str, Any] | None) -> str:
    return "-" if facts is None else f"{facts['memory']['beyond'] * 1e-6:,.1f}"


def _cell(facts: Mapping[str, Any] | None, name: str, factor: float, form: str) -> str:
    return "-" if facts is None else format(facts[name] * factor if factor != 1 else facts[name], form)


def _budget(budget: Any) -> str:
    return str(budget) if isinstance(budget, str) else f"budget {budget}"


def _milliseconds(spread: Mapping[str, Any] | None) -> str:
    return "-" if spread is None else f"{1e3 * spread['median']:,.2f}"


def _ratio(spread: Mapping[str, Any] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f}x [{spread['low']:.2f}, {spread['high']:.2f}]"


def _exponents(growth: Mapping[str, Any]) -> str:
    upper = growth["upper_exponent"]
    return f"{growth['exponent']:.2f}" + ("" if upper is None else f", {upper:.2f}")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(["  " + first, *others]).rstrip())
    return lines


__all__ = ["choosing_text", "comparison_text", "scaling_text", "where"]
