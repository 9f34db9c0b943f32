"""What `reccomp-hf demo` does: questions about a picture, with compression and without, to a small trained model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import textwrap
import time
from typing import Any, TypeAlias

import torch
from PIL import Image

from ..core.configuration import TokenRecoveryConfig
from ..core.features import TokenRecoveryOutput
from ..data.pictures import open_picture
from ..demo import draw_scene, questions
from ..measure.plot import plot_recovery

DEFAULT_OUTPUT = "reccomp-demo.png"
DEFAULT_SEED = 1_000_000
"""The first of `EVALUATION_SEEDS` whose questions are all answered right with 16 tokens and with all 144."""
DEFAULT_BUDGET = 0.11  # of 144 tokens: 16
PICTURE_QUESTIONS = ("How many objects are there?", "Is there a red circle?", "What color is the square?")

Budget: TypeAlias = tuple[int | float | None]  # of one, since `None` is a budget too

_MAX_NEW_TOKENS = 8  # the demo model's answers are one word
_WIDEST_CELLS = (32, 10, 11, 13, 29)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and what is asked about it.

    Attributes:
        image: RGB picture.
        source: What it is, for the reader.
        questions: One or more.
        expected: An answer for every question, `None` where nobody knows it.
        seed: Of a drawn scene, `None` for a picture file.
    """

    image: Image.Image
    source: str
    questions: list[str]
    expected: list[str | None]
    seed: int | None


def drawn_picture(seed: int | None = None, asked: list[str] | None = None) -> Picture:
    """Draw the scene of a seed; its own questions unless others are asked."""
    seed = DEFAULT_SEED if seed is None else seed
    scene = draw_scene(seed)
    answers = {question.text: question.answer for question in questions(scene, seed)}
    asked = _checked(asked) or list(answers)
    objects = ", ".join(f"{item.color} {item.shape}" for item in scene.objects)
    return Picture(scene.image, f"drawn scene {seed}: {objects}", asked, [answers.get(text) for text in asked], seed)


def picture_file(path: str, asked: list[str] | None = None) -> Picture:
    """Read a picture file of any size and mode.

    Raises:
        OSError: It is missing or cannot be read as a picture.
    """
    try:
        image = open_picture(path)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise OSError(f"{path} cannot be read as a picture: {reason}") from error
    asked = _checked(asked) or list(PICTURE_QUESTIONS)
    source = f"{path}, {image.width} x {image.height} pixels; the model sees its middle square at 96 x 96"
    return Picture(image, source, asked, [None] * len(asked), None)


def budget(text: str) -> Budget:
    """Read a number of tokens, a share of them or "dynamic", for argparse."""
    if text == "dynamic":
        return (None,)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return (number(text),)
    raise argparse.ArgumentTypeError(f"expected a number of tokens, a share of them or 'dynamic', got {text!r}")


def _checked(asked: list[str] | None) -> list[str] | None:
    if asked and not all(text.strip() for text in asked):
        raise ValueError("A question is empty: write --question TEXT.")
    return asked


def settings(preset: str, budget: Budget | None = None) -> dict[str, Any]:
    """Fields of a preset for a checkpoint's section; "balanced" has `DEFAULT_BUDGET` unless another is given.

    Raises:
        ValueError: An unknown preset, or a budget that does not fit.
    """
    if budget is None and preset == "balanced":
        budget = (DEFAULT_BUDGET,)
    overrides = {} if budget is None else {"budget": budget[0]}
    return TokenRecoveryConfig.from_preset(preset, **overrides).overridable()


@torch.no_grad()
def compare(model: Any, processor: Any, picture: Picture) -> tuple[dict[str, Any], list[TokenRecoveryOutput]]:
    """Ask everything with compression and without.

    Returns:
        Plain values, see the keys, and what was done with the picture for each question.
    """
    turns = [[{"type": "image"}, {"type": "text", "text": text}] for text in picture.questions]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        for turn in turns
    ]
    inputs = processor(
        images=[picture.image] * len(prompts), text=prompts, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device, model.dtype)
    answers, seconds = [], []
    for override in ({}, {"enabled": False}):
        options = {"max_new_tokens": _MAX_NEW_TOKENS, "do_sample": False, "token_recovery": override}
        model.generate(**inputs, **options)  # what a first call costs is nobody's answer
        began = time.perf_counter()
        ids = model.generate(**inputs, **options)
        seconds.append(round((time.perf_counter() - began) / len(prompts), 5))
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append([reply.strip() for reply in replies])
    records = model.recover(**inputs)
    rows = zip(picture.questions, picture.expected, *answers, map(_count, records), strict=True)
    facts = {
        "picture": picture.source,
        "seed": picture.seed,
        "budget": model.config.token_recovery.budget,
        "seconds_per_question": dict(zip(("compressed", "uncompressed"), seconds, strict=True)),
        "answers": [
            {"question": question, "expected": expected, "compressed": short, "uncompressed": full, "tokens": tokens}
            for question, expected, short, full, tokens in rows
        ],
    }
    return facts, records


def draw(
    facts: dict[str, Any], picture: Picture, records: list[TokenRecoveryOutput], processor: Any, path: str
) -> None:
    """Write the picture under each question, with marks, to a file."""
    answers = [
        f"{answer['compressed'] or 'nothing'} (reading all: {answer['uncompressed'] or 'nothing'})"
        for answer in facts["answers"]
    ]
    method = facts["method"]
    figure = plot_recovery(
        picture.image, records, processor=processor, questions=picture.questions, answers=answers, method=method
    )
    figure.savefig(path)


def _count(record: TokenRecoveryOutput) -> dict[str, Any]:
    """How many tokens stand for the picture, and why."""
    patches, total = record.cluster.numel(), int(record.counts.sum())
    return {**record.stage_counts(), "total": total, "of": patches, "share": round(total / patches, 4)}


def report(facts: dict[str, Any]) -> str:
    """What `compare` found, as a table of at most 100 columns and a sentence in plain words."""
    answers = facts["answers"]
    known = any(answer["expected"] for answer in answers)
    rows = [["question", "expected", "compressed", "uncompressed", f"visual tokens of {answers[0]['tokens']['of']}"]]
    for answer in answers:
        words = [answer["question"], answer["expected"] or "-", answer["compressed"], answer["uncompressed"]]
        rows.append([*words, _sum(answer["tokens"])])
    columns = [0, 1, 2, 3, 4] if known else [0, 2, 3, 4]
    rows = [[row[column] for column in columns] for row in rows]
    lines = _table(rows, [_WIDEST_CELLS[column] for column in columns])
    lines += ["", "Tokens: salient in the picture + recovered for the question + spread for coverage + merged = total"]
    lines += ["", *textwrap.wrap(_sentence(facts, known), 100)]
    times = {name: f"{1000 * seconds:.1f} ms" for name, seconds in facts["seconds_per_question"].items()}
    lines += [f"Time per question here: {times['compressed']} compressed, {times['uncompressed']} uncompressed."]
    lines += [f"Wrote {facts['output']}: the picture under each question, with the patches that were read."]
    lines += ["Next: README.md, and `reccomp-hf convert --help` for a LLaVA-1.5 or LLaVA-NeXT of your own."]
    return "\n".join(lines)


def _sum(tokens: dict[str, Any]) -> str:
    parts = " + ".join(f"{tokens[name]:>2}" for name in ("visual", "text", "coverage", "merged"))
    return f"{parts} = {tokens['total']:>2} ({tokens['share']:.0%})"


def _table(rows: list[list[str]], widest: list[int]) -> list[str]:
    """Rows as aligned lines; a cell that is too wide goes on below itself."""
    cells = [[textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widest, strict=True)] for row in rows]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(widest))]
    lines = []
    for number, row in enumerate(cells):
        for pieces in itertools.zip_longest(*row, fillvalue=""):
            padded = (piece.ljust(width) for piece, width in zip(pieces, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines


def _sentence(facts: dict[str, Any], known: bool) -> str:
    answers = facts["answers"]
    totals, patches = [answer["tokens"]["total"] for answer in answers], answers[0]["tokens"]["of"]
    number = f"{min(totals)}" if min(totals) == max(totals) else f"{min(totals)} to {max(totals)}"
    share = sum(totals) / len(totals) / patches
    same = sum(answer["compressed"] == answer["uncompressed"] for answer in answers)
    sentence = (
        f"Reading {number} of {patches} visual tokens ({share:.0%}), the compressed model gave the uncompressed "
        f"model's answer to {same} of {len(answers)} questions"
    )
    if known:
        asked = [answer for answer in answers if answer["expected"]]
        right, full = (sum(a[name] == a["expected"] for a in asked) for name in ("compressed", "uncompressed"))
        sentence += f", and the expected one to {right} of {len(asked)} (uncompressed: {full})"
    if facts["seed"] is None:
        return f"{sentence}. This small model knows drawn shapes only: of other pictures it understands nothing."
    if known and facts["seed"] == DEFAULT_SEED and right == full == len(asked):
        return f"{sentence}. This scene was picked because both do well on it; for others: --seed 1000001 and on."
    return f"{sentence}."
