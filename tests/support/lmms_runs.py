"""Runs of lmms-eval, in this process or in one of its own, and reading what they wrote."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace


def run(model, arguments, folder, task="scenes", **options):
    """The results of a task that lmms-eval runs in this process, and its samples in order."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    cli_args = SimpleNamespace(process_with_media=True, reasoning_tags=None)
    options |= {"task_manager": tasks, "cli_args": cli_args, "bootstrap_iters": 0}
    results = simple_evaluate(model, arguments, tasks=[task], **options)
    return results, sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def answers_of(samples):
    return [sample["filtered_resps"][0].strip() for sample in samples]


def tokens_of(samples):
    return [sample["token_counts"][0]["visual_tokens"] for sample in samples]


def command(*arguments, **environment):
    """Run Python in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ran = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def read_output(output):
    """The results and the samples that `--output_path` and `--log_samples` wrote."""
    (results,), (logged,) = output.glob("*/*_results.json"), output.glob("*/*_samples_scenes.jsonl")
    rows = [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()]
    return json.loads(results.read_text()), sorted(rows, key=lambda row: row["doc_id"])
