"""Throughput in vLLM: the stock model and ours answer the same requests of several clients, in turns."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...checkpoints.weight_files import WeightFiles
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import PICTURE
from ...measure.benchmark.comparing import check_counts
from ...measure.benchmark.contenders import OURS, STOCK
from ...measure.benchmark.environment import describe_environment, environment
from ...measure.benchmark.reporting import format_ratio
from ...measure.benchmark.timing import Measures, Spread, interleave
from ...measure.tables import plain_table
from .starting import engine_options

CLIENTS, NEW_TOKENS, ROUNDS = (1, 8, 32), (8, 64), 5
REQUESTS = 2
"""Requests of each client in a turn."""
SPEED, WAIT, CACHE = "requests_per_second", "seconds_to_first_token", "cache_tokens"
RATIOS = {SPEED: (OURS, STOCK), WAIT: (STOCK, OURS), CACHE: (STOCK, OURS)}
"""Measure -> numerator and denominator of its ratio, which is above 1 where ours is better."""
_FORMS = {SPEED: "{:.2f}", WAIT: "{:.2f}", CACHE: "{:,.0f}"}
_QUESTION = "What letter is on the cyan sign? " * 8  # a prompt of about 70 tokens, as in measure/benchmark

Generate = Callable[[Any], AsyncIterator[Any]]
"""Yields something for each step in which a request gets new tokens."""


async def ask_all(
    generate: Generate, requests: Sequence[Any], clients: int, now: Callable[[], float] = time.perf_counter
) -> Measures:
    """Have clients ask requests, each its next one when its last one is answered.

    Args:
        generate: Answers a request.
        requests: The requests, taken in this order by whichever client is free.
        clients: Number of clients.
        now: The clock, in seconds.

    Returns:
        Requests per second, and the median time from asking to the first token in seconds.
    """
    left, waits = iter(requests), []

    async def client() -> None:
        for request in left:
            asked, steps = now(), 0
            async for _ in generate(request):
                if not steps:
                    waits.append(now() - asked)
                steps += 1

    began = now()
    await asyncio.gather(*(client() for _ in range(clients)))
    return {SPEED: len(requests) / (now() - began), WAIT: float(np.median(waits))}


def compare_throughput(
    folder: str | Path,
    budget: int | float | None = None,
    *,
    clients: Sequence[int] = CLIENTS,
    new_tokens: Sequence[int] = NEW_TOKENS,
    rounds: int = ROUNDS,
    picture: tuple[int, int] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Compare the stock model with the compressed one under load, in two engines of vLLM that take turns.

    In a round both engines are asked the same requests, each about an image of noise that no cache has seen. Ratios
    are taken within a round. One more request warms up.

    Args:
        folder: A compressed checkpoint; without weights it gets random ones.
        budget: Tokens of an image, or their share; `None` is the checkpoint's own.
        clients: Numbers of clients.
        new_tokens: Tokens of every answer, at least 2.
        rounds: Rounds for each number of clients and tokens.
        picture: Width and height of the images in pixels; `None` is 640 x 480.
        dtype: Data type of the weights, as in `engine_options`.
        seed: Seed of the noise.
        **options: Further arguments of both engines (`vllm.EngineArgs`).

    Returns:
        JSON values: `"environment"`, `"settings"`, and `"rows"`, one per number of clients and of tokens, with the
        measures of both engines and their ratios: requests per second, seconds to the first token (a turn's median),
        and most tokens in the KV cache at a time, whole blocks of it.

    Raises:
        ValueError: A number that is too small, or a checkpoint or budget that vLLM cannot serve.
    """
    check_counts(rounds=rounds, **{f"clients {count}": count for count in clients})
    if min(new_tokens) < 2:
        raise ValueError(f"new tokens must be at least 2 with --engine vllm, got {min(new_tokens)}.")
    if not WeightFiles.find(Path(folder)).present:
        options["load_format"] = "dummy"
    draw, rows = _Requests(picture or PICTURE, seed), []
    with _engines(folder, budget, dtype, options) as engines:
        for tokens, count in itertools.product(new_tokens, clients):
            batches, first = [draw(REQUESTS * count) for _ in range(rounds)], draw(1)
            for engine in engines.values():
                engine.ask(first, 1, tokens)  # warms up
            turns = {name: _turn(engine, batches, count, tokens) for name, engine in engines.items()}
            rows.append({"clients": count, "new_tokens": tokens, **throughput_row(interleave(turns, rounds))})
        facts, section = engines[STOCK].facts(), engines[OURS].section
    return {
        "environment": facts,
        "settings": {"rounds": rounds, "requests_per_client": REQUESTS, "token_recovery": section.to_dict()},
        "rows": rows,
    }


def throughput_row(measured: Mapping[str, Mapping[str, Spread]]) -> dict[str, Any]:
    """The measures of both engines and the ratios of `RATIOS`, as JSON values."""
    ratios = {name: measured[above][name].over(measured[below][name]) for name, (above, below) in RATIOS.items()}
    engines = {name: {key: spread.to_dict() for key, spread in spreads.items()} for name, spreads in measured.items()}
    return {"engines": engines, "ratios": {name: ratio.to_dict() for name, ratio in ratios.items()}}


def throughput_text(name: str, facts: Mapping[str, Any]) -> str:
    """The results of `compare_throughput` as a table."""
    budget, rounds = facts["settings"]["token_recovery"]["budget"], facts["settings"]["rounds"]
    table = [["clients", "new tokens", "requests/s", "ratio", "first token, s", "ratio", "KV cache, tokens", "ratio"]]
    for row in facts["rows"]:
        cells = [str(row["clients"]), str(row["new_tokens"])]
        for measure, form in _FORMS.items():
            cells.append(" / ".join(form.format(row["engines"][key][measure]["median"]) for key in (STOCK, OURS)))
            cells.append(format_ratio(row["ratios"][measure]))
        table.append(cells)
    return "\n".join(
        [
            f"{name} in vLLM {facts['environment']['vllm']} on {describe_environment(facts)}",
            f"stock / ours with budget {budget}; medians of {rounds} rounds, in brackets the quartiles of ratios "
            "within a round; above 1 is in favour of ours",
            "",
            *plain_table(table),
        ]
    )


class _Requests:
    """Draws requests, each with an image of noise of its own."""

    def __init__(self, picture: tuple[int, int], seed: int) -> None:
        self._picture, self._random = picture, np.random.default_rng(seed)

    def __call__(self, count: int) -> list[dict[str, Any]]:
        width, height = self._picture
        noise = self._random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        prompt = f"USER: <image>\n{_QUESTION}ASSISTANT:"
        return [{"prompt": prompt, "multi_modal_data": {"image": Image.fromarray(pixels)}} for pixels in noise]


def _turn(engine: _Engine, batches: Sequence[Sequence[Any]], clients: int, new_tokens: int) -> Callable[[], Measures]:
    """A function that asks an engine the next batch of requests each time it is called."""
    left = iter(batches)
    return lambda: engine.ask(next(left), clients, new_tokens)


@contextlib.contextmanager
def _engines(
    folder: str | Path, budget: int | float | None, dtype: str | None, options: Mapping[str, Any]
) -> Iterator[dict[str, _Engine]]:
    """Both engines, each with processes of its own; the one that does not answer waits for requests."""
    sections: dict[str, dict[str, Any]] = {
        STOCK: {"enabled": False},
        OURS: {} if budget is None else {"budget": budget},
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB for each; by default nine tenths of the memory
    loop, engines = asyncio.new_event_loop(), {}
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        for name, section in sections.items():
            settings = {**engine_options(folder, section, dtype), "gpu_memory_utilization": 0.45, **options}
            engines[name] = _Engine(settings, loop)
            stack.callback(engines[name].close)
        yield engines


class _Engine:
    """The front end of vLLM's server without HTTP."""

    def __init__(self, options: Mapping[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._loop, self._cache, self._names = loop, _CacheUse(), itertools.count()
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**options), stat_loggers=[lambda config, index: self._cache]
        )

    def ask(self, requests: Sequence[Any], clients: int, new_tokens: int) -> Measures:
        """The measures of one turn."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)

        def generate(request: Any) -> AsyncIterator[Any]:
            return self._llm.generate(request, sampling.clone(), f"request-{next(self._names)}")

        self._cache.most = 0.0
        measures = self._loop.run_until_complete(ask_all(generate, requests, clients))
        cache = self._llm.vllm_config.cache_config
        blocks = round(self._cache.most * (cache.num_gpu_blocks - 1))  # one block is never used
        return {**measures, CACHE: float(blocks * cache.block_size)}

    @property
    def section(self) -> TokenRecoveryConfig:
        """The settings."""
        return self._llm.model_config.hf_config.token_recovery

    def facts(self) -> dict[str, Any]:
        """The environment of the measurements."""
        import vllm
        from vllm.platforms import current_platform

        device = torch.device("cpu" if current_platform.is_cpu() else current_platform.device_type)
        return {**environment(device, self._llm.model_config.dtype), "vllm": vllm.__version__}

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()
        self._loop.run_until_complete(asyncio.sleep(0))  # its own task ends
        del self._llm  # while vLLM's modules are there, which it calls once more


class _CacheUse:
    """A logger of vLLM's statistics that keeps the largest share of the KV cache in use at a time."""

    most = 0.0

    def record(self, scheduler_stats: Any, *others: Any, **more: Any) -> None:
        """Called by vLLM after a step."""
        if scheduler_stats is not None:
            self.most = max(self.most, scheduler_stats.kv_cache_usage)

    def log(self) -> None:
        """Called by vLLM from time to time."""

    def log_engine_initialized(self) -> None:
        """Called by vLLM once."""

    def record_sleep_state(self, *arguments: Any) -> None:
        """Called by vLLM when an engine is put to sleep."""


__all__ = [
    "CLIENTS",
    "NEW_TOKENS",
    "RATIOS",
    "ROUNDS",
    "ask_all",
    "compare_throughput",
    "throughput_row",
    "throughput_text",
]
