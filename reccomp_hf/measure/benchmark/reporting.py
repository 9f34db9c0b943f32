"""The comparison's results as text: aligned tables and sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..tables import plain_table
from .contenders import ORACLE, OURS, STOCK
from .environment import describe_environment
from .stages import REST, WHOLE

_MEASURES = {
    "prefill": "prefill, ms",
    "decode": "decoding a token, ms",
    "answer": "the whole answer, ms",
}
_RATIOS = {"stock / ours": (STOCK, OURS), "ours / oracle": (OURS, ORACLE)}


def comparison_text(name: str, facts: Mapping[str, Any]) -> str:
    """The results of `compare` for a reader."""
    settings = facts["settings"]
    lines = [
        f"{name} on {describe_environment(facts)}",
        f"medians of {settings['rounds']} rounds by {settings['clock']}, in brackets the quartiles of ratios within a "
        f"round; answers of {settings['new_tokens']} tokens"
        + ("; prefills of ours and the oracle as CUDA graphs" if settings["cuda_graph"] else ""),
    ]
    for row in facts["rows"]:
        lines += ["", *_row_lines(row)]
    for which, found in (facts.get("largest_batches") or {}).items():
        speed = found["tokens_per_second"]
        decoded = "" if speed is None else f", which decodes {speed:,.0f} tokens a second"
        lines += ["", f"largest batch, {which}: {found['batch_size']}{decoded}"]
    lines += ["", "oracle: one whole pass of the vision tower, and the short prompt's embeddings for nothing."]
    return "\n".join([*lines, f"device reads: {facts['device_reads_are']}.", *facts["notes"]])


def _row_lines(row: Mapping[str, Any]) -> list[str]:
    """One batch size and budget."""
    contenders = row["contenders"]
    table = [[f"batch {row['batch_size']}, {_budget(row['budget'])}", *contenders, *_RATIOS]]
    for measure, label in _MEASURES.items():
        cells = [format_milliseconds(facts and facts["seconds"][measure]) for facts in contenders.values()]
        ratios = [format_ratio(row["ratios"][f"{measure}, {ratio}"]) for ratio in _RATIOS]
        table.append([label, *cells, *ratios])
    counts = {
        "prompt tokens": [_cell(facts, "prompt_tokens", 1, ",.1f") for facts in contenders.values()],
        "visual tokens": [_cell(facts, "visual_tokens", 1, ",.1f") for facts in contenders.values()],
        "KV cache, MB": [_cell(facts, "kv_cache_bytes", 1e-6, ",.1f") for facts in contenders.values()],
        "peak beyond the weights, MB": [_memory(facts) for facts in contenders.values()],
        "device reads": [_cell(facts, "device_reads", 1, "d") for facts in contenders.values()],
    }
    table += [[label, *cells, *_count_ratios(label, row)] for label, cells in counts.items()]
    stages = [
        f"{stage.replace('_', ' ')} {1e3 * seconds['median']:,.2f}"
        for stage, seconds in row["stages"].items()
        if stage not in (WHOLE, REST)
    ]
    rest = row["stages"].get(REST)
    stages += [f"{REST} {1e3 * rest['median']:,.2f}"] if rest and stages else []
    line = f"stages of ours under the profiler, ms: {', '.join(stages)}" if stages else ""
    return [*plain_table(table), *textwrap.wrap(line, 110, initial_indent="  ", subsequent_indent="    ")]


def _count_ratios(label: str, row: Mapping[str, Any]) -> list[str]:
    """The cache's ratios; other counts have none worth a column."""
    if not label.startswith("KV"):
        return ["", ""]
    contenders, cells = row["contenders"], []
    for above, below in _RATIOS.values():
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


def format_milliseconds(spread: Mapping[str, Any] | None) -> str:
    """A median in milliseconds."""
    return "-" if spread is None else f"{1e3 * spread['median']:,.2f}"


def format_ratio(spread: Mapping[str, Any] | None) -> str:
    """A median ratio with its quartiles."""
    return "-" if spread is None else f"{spread['median']:.2f}x [{spread['low']:.2f}, {spread['high']:.2f}]"


__all__ = ["comparison_text", "format_milliseconds", "format_ratio"]
