"""The README's table: accuracy of the demo model under several settings (`python -m reccomp_hf.demo.measure`)."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..configuration_reccomp import PRESETS
from ..convert import convert
from . import EVALUATION_SEEDS, QUESTION_KINDS, Question, Scene, checkpoint_folder, draw_scene, questions

BATCH = 64  # questions


def settings(budgets: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Name -> fields that override the preset `paper`."""
    stages = {"merged_tokens": 0}
    table: dict[str, dict[str, Any]] = {
        "uncompressed": {"enabled": False},
        "paper, dynamic": {},
        "authors": {"method": "authors"},
        "2x2 pooling": {"method": "pooling_2x2", "position_ids": "original"},
        "3x3 pooling": {"method": "pooling_3x3", "position_ids": "original"},
    }
    for budget in budgets:
        fixed = {
            "balanced": PRESETS["balanced"],
            "coverage only": {**PRESETS["balanced"], "coverage_share": 1.0},
            "paper's stages": stages,
            "paper's stages, visual only": {**stages, "text_share": 0.0},
        }
        table |= {f"{name}, {budget}": {**fields, "budget": budget} for name, fields in fixed.items()}
    return table


@torch.no_grad()
def measure(model: Any, processor: Any, scenes: int, table: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy by question kind and mean visual tokens, over the first `scenes` evaluation seeds.

    Returns:
        Setting -> {kind: share of exact answers, "mean": mean over kinds, "tokens": visual tokens per picture}.
    """
    asked = [(scene, item) for seed in EVALUATION_SEEDS[:scenes] for scene, item in _asked(seed)]
    right: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in table}
    tokens: dict[str, list[int]] = {name: [] for name in table}
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    for batch, name in tqdm(list(itertools.product(batches, table)), desc="batches", file=sys.stderr):
        prompts = [f"USER: <image>\n{item.text} ASSISTANT:" for _, item in batch]
        pictures = [scene.image for scene, _ in batch]
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, token_recovery=table[name]
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        for (_, item), answer in zip(batch, processor.batch_decode(new, skip_special_tokens=True), strict=True):
            right[name][item.kind].append(answer.strip() == item.answer)
        counts = getattr(output, "visual_token_counts", None)
        tokens[name] += [model.config.image_seq_length] * len(batch) if counts is None else counts.tolist()
    result = {}
    for name, kinds in right.items():
        shares = {kind: sum(kinds[kind]) / len(kinds[kind]) for kind in QUESTION_KINDS}
        result[name] = {
            **shares,
            "mean": sum(shares.values()) / len(shares),
            "tokens": sum(tokens[name]) / len(tokens[name]),
        }
    return result


def _asked(seed: int) -> list[tuple[Scene, Question]]:
    scene = draw_scene(seed)
    return [(scene, item) for item in questions(scene, seed)]


def main(argv: list[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m reccomp_hf.demo.measure", description=__doc__)
    parser.add_argument("--scenes", type=int, default=300, help="pictures, five questions each (default: 300)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[36, 16, 8], help="tokens of 144 (default: 36 16 8)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = convert(checkpoint_folder("llava"), checkpoint_folder("clip"), Path(folder, "model"))
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        result = measure(
            model, AutoProcessor.from_pretrained(path), arguments.scenes, settings(tuple(arguments.budgets))
        )
    lines = [
        f"| setting | tokens of 144 | {' | '.join(QUESTION_KINDS)} | mean |",
        "|---" * (len(QUESTION_KINDS) + 3) + "|",
    ]
    for name, row in result.items():
        cells = [f"{row['tokens']:.1f}", *(f"{row[kind]:.3f}" for kind in (*QUESTION_KINDS, "mean"))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
