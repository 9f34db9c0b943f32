"""Times the stock model, ours and the oracle on the same prompts, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ...core.checks import is_tiled
from ...core.choosing import check_budget
from ...core.compat import CACHE
from ...core.counting import patches_per_side
from ...core.graphs import GraphCache
from ...data.progress import progress_bar
from .batches import Inputs
from .contenders import ORACLE, OURS, STOCK, Contender, oracle, ours, stock
from .counting import CPU_READS, CUDA_READS, cache_bytes, device_reads, peak_memory
from .environment import environment
from .stages import stage_seconds
from .timing import Spread, Stopwatch, gather, interleave

DYNAMIC = "dynamic"
BudgetLabel: TypeAlias = "int | float | str"
"""Tokens per image, a share of its patches, or `DYNAMIC`."""
BUDGETS: tuple[BudgetLabel, ...] = (DYNAMIC, 64, 128)
BATCH_SIZES = (1, 4, 16)
ROUNDS, NEW_TOKENS, PROFILED = 7, 16, 3
RATIOS = {
    "prefill, stock / ours": ("prefill", STOCK, OURS),
    "prefill, stock / oracle": ("prefill", STOCK, ORACLE),
    "prefill, ours / oracle": ("prefill", OURS, ORACLE),
    "decode, stock / ours": ("decode", STOCK, OURS),
    "decode, ours / oracle": ("decode", OURS, ORACLE),
    "answer, stock / ours": ("answer", STOCK, OURS),
    "answer, ours / oracle": ("answer", OURS, ORACLE),
}
"""Name of a ratio -> the measure, numerator and denominator."""

Times = Mapping[str, Mapping[str, Spread]]


def compare(
    model: Any,
    inputs_of: Callable[[int], Inputs],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    budgets: Sequence[BudgetLabel] = BUDGETS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    cpu_time: bool = False,
    cuda_graph: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Compare the stock model, ours and the oracle, interleaved in this process.

    Every batch size has its own rounds, in which the stock model and the two contenders of every budget take turns.
    Ratios are taken within a round. Counts, memory and stages come from further, untimed turns.

    Args:
        model: A compressed LLaVA with a text encoder or without, in eval mode.
        inputs_of: Function from a number of rows to the model's inputs.
        batch_sizes: Rows per batch.
        budgets: Tokens per image, shares of its patches, or `"dynamic"`.
        new_tokens: Tokens to decode after every prompt.
        rounds: Timed turns of each contender, after one warm-up turn.
        cpu_time: Count CPU seconds of this process, see [`Stopwatch`].
        cuda_graph: Whether prefills of ours and of the oracle are replayed as CUDA graphs.
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Returns:
        JSON values: `"environment"`, `"settings"`, `"notes"`, and `"rows"`, one per batch size and budget, with
        `"contenders"`, `"ratios"` and `"stages"`. Seconds and bytes.

    Raises:
        ValueError: A number below 1, or a budget above the model's number of patches.
    """
    check_counts(rounds=rounds, new_tokens=new_tokens, **{f"batch size {size}": size for size in batch_sizes})
    sections = budget_fields(model, budgets)
    stopwatch = Stopwatch(model.device, cpu_time)
    turns = len(batch_sizes) * ((1 + 2 * len(budgets)) * (rounds + 1) + PROFILED * len(budgets))
    rows: list[dict[str, Any]] = []
    with progress_bar(turns, "turns", progress) as bar:
        for size in batch_sizes:
            graphs = GraphCache() if cuda_graph else None
            contenders = _BatchSize(model, inputs_of(size), sections, graphs, stopwatch, bar.update)
            rows += contenders.rows(size, rounds, new_tokens)
    return {
        "environment": environment(model.device, model.dtype),
        "settings": {
            "new_tokens": new_tokens,
            "rounds": rounds,
            "clock": stopwatch.clock,
            "cuda_graph": cuda_graph,
            "token_recovery": model.config.token_recovery.to_dict(),
        },
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "device_reads_are": CUDA_READS if model.device.type == "cuda" else CPU_READS,
        "notes": notes(model.device, rows),
        "rows": rows,
    }


def budget_fields(model: Any, budgets: Sequence[BudgetLabel]) -> dict[BudgetLabel, dict[str, Any]]:
    """The fields of the section that each budget overrides.

    Raises:
        ValueError: A budget above the model's number of patches.
    """
    sections = {budget: {"budget": None if budget == DYNAMIC else budget} for budget in budgets}
    patches = patches_per_side(model.config) ** 2
    for fields in sections.values():
        section = model.config.token_recovery.replace(fields)
        if not is_tiled(model.config):
            check_budget(section, patches)
    return sections


def check_counts(**counts: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: A number is below 1; the message names it.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {count}.")


def notes(device: torch.device, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about what was not measured."""
    sentences = []
    if device.type != "cuda":
        sentences.append(
            "There was no GPU: times are a CPU's, its memory with weights is not measured, and instead of "
            "synchronisations the reads are counted that would cause them."
        )
    failed = [
        f"{name} at batch size {row['batch_size']}, {row['budget']}"
        for row in rows
        for name, facts in row["contenders"].items()
        if facts is None
    ]
    if failed:
        sentences.append(f"Out of memory: {'; '.join(failed)}.")
    return sentences


class _BatchSize:
    """All contenders on one batch."""

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        sections: Mapping[BudgetLabel, dict[str, Any]],
        graphs: GraphCache | None,
        stopwatch: Stopwatch,
        step: Callable[[], Any],
    ) -> None:
        self.device, self.stopwatch, self.step, self.budgets = model.device, stopwatch, step, list(sections)
        self.contenders: dict[str, Contender] = {STOCK: stock(model, inputs)}
        for budget, fields in sections.items():
            self.contenders[f"{OURS} {budget}"] = ours(model, inputs, fields, graphs)
            self.contenders[f"{ORACLE} {budget}"] = oracle(model, inputs, fields, graphs)

    def rows(self, size: int, rounds: int, new_tokens: int) -> list[dict[str, Any]]:
        """The results, a row per budget."""
        running = {name: one for name, one in self.contenders.items() if self._fits(one, new_tokens)}
        turns = {name: self._turn(one, new_tokens) for name, one in running.items()}
        times = interleave(turns, rounds, self.step) if turns else {}
        facts = {name: _facts(one, times[name], self.device) for name, one in running.items()}
        rows = []
        for budget in self.budgets:
            names = {STOCK: STOCK, OURS: f"{OURS} {budget}", ORACLE: f"{ORACLE} {budget}"}
            measured = {role: times[name] for role, name in names.items() if name in times}
            ran = running.get(names[OURS])
            rows.append(
                {
                    "batch_size": size,
                    "budget": budget,
                    "contenders": {role: facts.get(name) for role, name in names.items()},
                    "ratios": ratios(measured),
                    "stages": {} if ran is None else self._stages(ran),
                }
            )
        return rows

    def _turn(self, contender: Contender, new_tokens: int) -> Callable[[], dict[str, float]]:
        return lambda: contender.turn(self.stopwatch, new_tokens)

    def _fits(self, contender: Contender, new_tokens: int) -> bool:
        """Take the warm-up turn; return whether memory sufficed."""
        self.step()
        try:
            contender.turn(self.stopwatch, new_tokens)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        return True

    def _stages(self, contender: Contender) -> dict[str, Any]:
        turns = []
        for _ in range(PROFILED):
            turns.append(stage_seconds(contender.prefill, self.device))
            self.step()
        return {stage: seconds.to_dict() for stage, seconds in gather(turns).items()}


def ratios(times: Times) -> dict[str, Any]:
    """The ratios of `RATIOS`, taken round by round; `None` where one of the contenders did not run."""
    found: dict[str, Any] = {}
    for name, (measure, above, below) in RATIOS.items():
        both = above in times and below in times
        found[name] = times[above][measure].over(times[below][measure]).to_dict() if both else None
    return found


def _facts(contender: Contender, times: Mapping[str, Spread], device: torch.device) -> dict[str, Any]:
    mask = contender.attention_mask
    return {
        "seconds": {measure: spread.to_dict() for measure, spread in times.items()},
        "prompt_tokens": float(mask.sum(-1).float().mean()),
        "prompt_length": mask.shape[1],  # the longest row's
        "visual_tokens": float(contender.visual_tokens.float().mean()),
        "kv_cache_bytes": cache_bytes(getattr(contender.prefill(), CACHE)),
        "memory": peak_memory(contender.prefill, device),
        "device_reads": device_reads(contender.prefill, device),
    }


__all__ = [
    "BATCH_SIZES",
    "BUDGETS",
    "DYNAMIC",
    "NEW_TOKENS",
    "PROFILED",
    "RATIOS",
    "ROUNDS",
    "BudgetLabel",
    "budget_fields",
    "check_counts",
    "compare",
    "notes",
    "ratios",
]
