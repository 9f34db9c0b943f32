"""Conversations about one image: quality and cost of every answer by the mode of the conversation.

`python -m reccomp_hf.experiments.conversations demo --settings balanced:16` prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..conversation.conversation import MODES, Conversation
from ..data.progress import progress_bar
from ..demo import EVALUATION_SEEDS, draw_scene
from ..demo.scene_questions import (
    Question,
    absent_question,
    alone_in_shape,
    color_question,
    present_question,
    read_question,
    shape_question,
)
from ..demo.scenes import SceneObject, generator
from ..measure.evaluation.report import EvaluationReport, SettingResult
from ..measure.evaluation.samples import normalize_answer
from ..measure.evaluation.settings import OFF, Setting, parse_setting, parse_settings
from ..measure.tables import markdown_table

DEFAULT_SETTINGS = "balanced:16,text:16+position_ids=original"
FIGURES = ("visual_tokens", "recovered", "prefilled", "cache_length", "milliseconds")
"""Figures reported for every turn, see [`Turn`]; milliseconds are those of the whole `ask`."""

_STREAM = 13  # first word of the seed, see `generator`
_LONGEST = 4  # questions


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Questions about different objects of an image.

    Attributes:
        image: The image.
        picture: Name of the image.
        questions: Two to four questions with their answers, at most one per object of the scene.
    """

    image: Image.Image = dataclasses.field(repr=False)
    picture: str
    questions: tuple[Question, ...]


def demo_dialogues(limit: int = 500, skip: int = 0) -> list[Dialogue]:
    """Make a conversation about each of the demo's evaluation scenes, which no demo model was trained on.

    Each question is about another object of the scene: its color, its shape, whether it is there (every other time
    replaced by a missing object that resembles it), or the letter on it.

    Args:
        limit: Number of conversations.
        skip: Number of scenes to skip.

    Raises:
        ValueError: The limit is not positive, or exceeds the number of scenes.
    """
    if limit < 1 or not 0 <= skip <= len(EVALUATION_SEEDS) - limit:
        raise ValueError(f"There must be a limit >= 1 and a skip >= 0 within the scenes, got {limit} and {skip}.")
    return [_dialogue(seed) for seed in EVALUATION_SEEDS[skip : skip + limit]]


def _dialogue(seed: int) -> Dialogue:
    scene, rng = draw_scene(seed), generator(_STREAM, seed)
    asked_about = rng.permutation(len(scene.objects))[:_LONGEST]
    questions = tuple(_question(scene.objects, int(index), rng) for index in asked_about)
    return Dialogue(scene.image, str(seed), questions)


def _question(objects: tuple[SceneObject, ...], index: int, rng: np.random.Generator) -> Question:
    """Draw a question about one object from the kinds that fit it."""
    kinds = ["shape", "exist"]
    kinds += ["color"] if index in alone_in_shape(objects) else []
    kinds += ["read"] if objects[index].letter is not None else []
    kind = kinds[rng.integers(len(kinds))]
    if kind == "exist":
        return absent_question(objects, index, rng) if rng.integers(2) else present_question(objects, index)
    return {"shape": shape_question, "color": color_question, "read": read_question}[kind](objects, index)


@dataclasses.dataclass
class ConversationReport:
    """All runs of the same conversations; a run is a mode and a setting.

    Attributes:
        answers: Accuracy by turn (its kinds are "turn 1", "turn 2", ...), agreement and intervals over scenes.
        kinds: The category of each question.
        figures: One value per question, by run and by name of `FIGURES`.
    """

    answers: EvaluationReport
    kinds: list[str]
    figures: dict[str, dict[str, npt.NDArray[np.float64]]]

    @property
    def turns(self) -> list[str]:
        """The turns in their order."""
        return sorted(set(self.answers.kinds))

    def mean(self, run: str, figure: str, turn: str) -> float:
        """Mean of a figure over the conversations that have the turn."""
        return float(self.figures[run][figure][np.array(self.answers.kinds) == turn].mean())

    def to_dict(self, compare: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
        """Everything as JSON values."""
        facts = self.answers.to_dict(compare)
        facts["figures"] = {
            run: {figure: {turn: self.mean(run, figure, turn) for turn in self.turns} for figure in FIGURES}
            for run in self.figures
        }
        for row, (answer, kind) in enumerate(zip(facts["answers"], self.kinds, strict=True)):
            answer["turn"], answer["kind"] = answer["kind"], kind
            for run, given in answer["given"].items():
                given |= {figure: float(self.figures[run][figure][row]) for figure in FIGURES}
        return facts

    def markdown(self, compare: Sequence[tuple[str, str]] = ()) -> str:
        """A table of accuracies, one of differences, and one of the figures of every turn."""
        runs = list(self.figures)
        rows = [["run", *self.turns, "mean [95 %]", "agreement"]]
        for run in runs:
            cells = [str(self.answers.accuracy(run, turn)) for turn in self.turns]
            rows.append([run, *cells, str(self.answers.accuracy(run)), f"{self.answers.agreement(run).value:.3f}"])
        tables = [rows]
        if compare:
            rows = [["difference", *self.turns, "mean [95 %]"]]
            for run, other in compare:
                differences = [self.answers.difference(run, other, turn) for turn in self.turns]
                differences.append(self.answers.difference(run, other))
                cells = [f"{cell.value:+.3f} [{cell.low:+.3f}, {cell.high:+.3f}]" for cell in differences]
                rows.append([f"{run} minus {other}", *cells])
            tables.append(rows)
        rows = [["run, by turn", *(figure.replace("_", " ") for figure in FIGURES)]]
        for run in runs:
            cells = [" / ".join(f"{self.mean(run, figure, turn):.1f}" for turn in self.turns) for figure in FIGURES]
            rows.append([run, *cells])
        return "\n\n".join("\n".join(markdown_table(rows)) for rows in [*tables, rows])


@dataclasses.dataclass
class _Run:
    """A mode and a setting under evaluation."""

    name: str
    mode: str
    setting: Setting
    most: int | None
    answers: list[str] = dataclasses.field(default_factory=list)
    figures: list[tuple[float, ...]] = dataclasses.field(default_factory=list)

    def talk(self, model: Any, processor: Any, dialogue: Dialogue, options: dict[str, Any]) -> None:
        """Hold a conversation."""
        conversation = Conversation(model, processor, self.mode, self.setting.fields, self.most)
        for number, question in enumerate(dialogue.questions):
            began = time.perf_counter()
            conversation.ask(
                question.text, None if number else dialogue.image, **options
            )  # returns text, so the device is done
            milliseconds = 1000 * (time.perf_counter() - began)
            turn = conversation.turns[-1]
            self.answers.append(turn.answer)
            self.figures.append((*(getattr(turn, figure) for figure in FIGURES[:-1]), milliseconds))

    def result(self, questions: Sequence[Question]) -> SettingResult:
        """The answers of the run."""
        right = [
            normalize_answer(answer) == normalize_answer(question.answer)
            for answer, question in zip(self.answers, questions, strict=True)
        ]
        unknown, figures = np.full(len(right), np.nan), np.array(self.figures)
        return SettingResult(
            name=self.name,
            fields=self.setting.fields,
            answers=self.answers,
            right=np.array(right),
            tokens=figures[:, 0].astype(np.int64),
            seconds_per_sample=float(figures[:, -1].mean()) / 1000,
            object_recall=unknown,
            object_precision=unknown,
        )


def evaluate_dialogues(
    model: Any,
    processor: Any,
    dialogues: Sequence[Dialogue],
    settings: str | Iterable[str | Setting] = DEFAULT_SETTINGS,
    modes: Sequence[str] = ("keep", "append", "rebuild"),
    *,
    max_new_tokens: int = 4,
    max_visual_tokens: int | None = None,
    progress: bool | None = None,
) -> ConversationReport:
    """Hold every conversation in every mode, greedily; the model's own answers stay in it, right or wrong.

    The uncompressed model always runs too (`off`), as a plain conversation that keeps its cache.

    Args:
        model: A compressed LLaVA, in eval mode.
        processor: The model's processor.
        dialogues: The conversations, see `demo_dialogues`.
        settings: Settings to compare, see `parse_setting`.
        modes: Modes of [`Conversation`].
        max_new_tokens: Longest answer in tokens.
        max_visual_tokens: Cap of `"append"`, see [`Conversation`].
        progress: Whether to show a progress bar; `None` shows it where stderr is a terminal.

    Raises:
        ValueError: There are no conversations, or a setting or mode is not valid.
    """
    runs = list(_runs(settings, modes, max_visual_tokens))
    if not dialogues:
        raise ValueError("There must be at least one conversation, got none.")
    for run in runs:  # check before any work, and warm up
        Conversation(model, processor, run.mode, run.setting.fields, run.most)
        dataclasses.replace(run, answers=[], figures=[]).talk(model, processor, dialogues[0], {"max_new_tokens": 2})
    with progress_bar(len(dialogues) * len(runs), "conversations", progress) as bar:
        for dialogue in dialogues:
            for run in runs:
                run.talk(model, processor, dialogue, {"max_new_tokens": max_new_tokens, "do_sample": False})
                bar.update()
    questions = [question for dialogue in dialogues for question in dialogue.questions]
    report = EvaluationReport(
        questions=[question.text for question in questions],
        kinds=[f"turn {number + 1}" for dialogue in dialogues for number in range(len(dialogue.questions))],
        pictures=[dialogue.picture for dialogue in dialogues for _ in dialogue.questions],
        results={run.name: run.result(questions) for run in runs},
        reference=OFF,
    )
    figures = {run.name: dict(zip(FIGURES, np.array(run.figures, dtype=float).T, strict=True)) for run in runs}
    return ConversationReport(report, [question.kind for question in questions], figures)


def _runs(settings: str | Iterable[str | Setting], modes: Sequence[str], most: int | None) -> Iterator[_Run]:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(f"Unknown mode {unknown[0]!r}; write some of {', '.join(MODES)}.")
    yield _Run(OFF, "keep", parse_setting(OFF), None)
    for setting in parse_settings(settings):
        for mode in dict.fromkeys(modes):
            if not setting.is_off:
                yield _Run(f"{mode} {setting.name}", mode, setting, most if mode == "append" else None)


def _pairs_to_compare(report: ConversationReport) -> list[tuple[str, str]]:
    """Every other mode against `keep` of the same setting."""
    runs = [run.split(" ", 1) for run in report.figures if run != OFF]
    return [(f"{mode} {name}", f"keep {name}") for mode, name in runs if mode != "keep" and ["keep", name] in runs]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint and print the tables."""
    from ..checkpoints.loading import load
    from ..checkpoints.quiet import quiet
    from ..cli.options import HelpFormatter, add_checkpoint, add_device, add_dtype, add_json_file, count
    from ..cli.output import say, write_results

    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.conversations",
        formatter_class=HelpFormatter,
        description="Holds conversations about the demo's held-out scenes in every mode and prints accuracy by turn.",
    )
    add_checkpoint(parser)
    parser.add_argument("--settings", default=DEFAULT_SETTINGS, metavar="LIST", help="settings separated by commas")
    parser.add_argument("--modes", default="keep,append,rebuild", metavar="LIST", help="modes separated by commas")
    parser.add_argument("--limit", type=count, default=500, metavar="N", help="conversations")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="pass over the first N scenes")
    parser.add_argument("--max-new-tokens", type=count, default=4, metavar="N", help="tokens of the longest answer")
    parser.add_argument("--max-visual-tokens", type=count, metavar="N", help="limit of append (default: none)")
    add_json_file(parser)
    add_device(parser)
    add_dtype(parser)
    arguments = parser.parse_args(argv)
    dialogues = demo_dialogues(arguments.limit, arguments.skip)
    with quiet():
        model, processor = load(arguments.model, {}, arguments.device, arguments.dtype)
        report = evaluate_dialogues(
            model,
            processor,
            dialogues,
            arguments.settings,
            arguments.modes.split(","),
            max_new_tokens=arguments.max_new_tokens,
            max_visual_tokens=arguments.max_visual_tokens,
        )
    pairs = _pairs_to_compare(report)
    say(f"{arguments.model}: {len(dialogues)} conversations, {len(report.kinds)} questions; 95 % intervals", "")
    say(report.markdown(pairs))
    write_results(arguments, lambda: {"model": arguments.model, **report.to_dict(pairs)})
    return 0


__all__ = ["ConversationReport", "Dialogue", "demo_dialogues", "evaluate_dialogues"]

if __name__ == "__main__":
    raise SystemExit(main())
