"""Names and defaults that options offer, as plain values: the modules that own them import torch.

A test holds each of them equal to its original, which the comments name.
"""

from __future__ import annotations

CHECKPOINTS = ("demo", "demo-global")  # demo.CHECKPOINTS
DTYPES = ("float32", "float16", "bfloat16")  # checkpoints.loading.DTYPES

# measure.published.FULL_SIZE
PUBLISHED = (
    "llava-1.5-7b",
    "llava-1.5-13b",
    "llava-v1.6-vicuna-7b",
    "llava-v1.6-vicuna-13b",
    "llava-v1.6-mistral-7b",
    "llama3-llava-next-8b",
    "llava-v1.6-34b",
)

COST_DTYPES = ("fp16", "int8", "int4")  # measure.cost.DTYPES
COST_IMAGE_SIZE = (640, 480)  # core.counting.PICTURE
HARDWARE = ("A100", "A100-80GB", "H100", "H200", "V100", "L4", "RTX 4090")  # measure.cost.HARDWARE

BENCH_CONFIGS = ("mid", *PUBLISHED)  # measure.benchmark.CONFIGS
BENCH_BATCH_SIZES = (1, 4, 16)  # measure.benchmark.BATCH_SIZES
BENCH_BUDGETS = ("dynamic", 64, 128)  # measure.benchmark.BUDGETS
BENCH_NEW_TOKENS, BENCH_ROUNDS = 16, 7  # defaults of measure.benchmark.compare
DYNAMIC = "dynamic"  # measure.benchmark.DYNAMIC

# defaults of engines.vllm.throughput.compare_throughput
THROUGHPUT_CLIENTS, THROUGHPUT_NEW_TOKENS, THROUGHPUT_ROUNDS = (1, 8, 32), (8, 64), 5

SERVE_BATCH_SIZE, SERVE_WAITING, SERVE_SECONDS = 16, 64, 600  # engines.server.answering

EVAL_BATCH_SIZE = 64  # measure.evaluation.DEFAULT_BATCH_SIZE
EVAL_SETTINGS = "off,paper,balanced:0.1,text:0.1,visual:0.1,coverage:0.1,random:0.1,pool:0.1"  # its DEFAULT_SETTINGS
# The methods among measure.evaluation.named_settings
EVAL_METHODS = (
    "authors",
    "fastervlm",
    "recoverable",
    "prumerge",
    "prumerge_plus",
    "visionzip",
    "trim",
    "vispruner",
    "divprune",
    "cdpruner",
    "scope",
    "holov",
    "hiprune",
    "mmtok",
    "random",
    "pooling",
    "pooling_2x2",
    "pooling_3x3",
    "base_tile",
)

TUNE_CANDIDATES = ("few", "many")  # measure.tuning.candidates.LISTS
TUNE_BATCH_SIZE, TUNE_NEW_TOKENS = 16, 16  # measure.tuning.DEFAULT_BATCH_SIZE, DEFAULT_NEW_TOKENS
