"""Measurements and answers of a demo model, kept in a file so that an experiment resumes after a kill."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..cli.options import output_file
from ..data.fingerprint import model_digest
from ..data.progress import progress_bar
from ..demo import CHECKPOINTS
from ..measure.evaluation.report import EvaluationReport, SettingResult
from ..measure.evaluation.running import evaluate
from ..measure.evaluation.samples import Sample, normalize_answer
from ..measure.evaluation.settings import OFF, Setting, parse_setting
from ..measure.tuning.choosing import Scores
from ..measure.tuning.measuring import Measurement, measure

Settings = Mapping[str, Mapping[str, Any]]
Make = Callable[[Sequence[Sample], Settings], Mapping[str, Sequence[Any]]]

NEW_TOKENS = 8
"""Longest answer; the right ones have one word."""
_BATCH, _PIECE = 50, 400  # questions in a forward pass, and between two lines of the file


class KeptAnswers:
    """A demo model, and its measurements and answers so far.

    Args:
        model: A compressed demo model in eval mode.
        processor: The model's processor.
        path: A file of JSON lines, made if it does not exist; `None` keeps nothing. A line holds for one version of
            the package, one model, some questions and one setting, and is not read for others.
    """

    def __init__(self, model: Any, processor: Any, path: str | Path | None = None) -> None:
        self.model, self.processor = model, processor
        self._path = None if path is None else Path(path)
        self._about = [__version__, model_digest(model)]
        self._lines: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError):  # a kill cut it off
                    self._lines |= [json.loads(line)]

    def scores(self, samples: Sequence[Sample], settings: Settings) -> Scores:
        """Divergence, agreement and tokens of settings, see [`measure`]; answers are not read."""

        def make(batch: Sequence[Sample], missing: Settings) -> dict[str, Any]:
            found = measure(self.model, self.processor, batch, missing, NEW_TOKENS)
            return {name: [dataclasses.astuple(row) for row in rows] for name, rows in found.items()}

        kept = self.kept("measure", samples, settings, make)
        return Scores.of({name: [Measurement(*row) for row in rows] for name, rows in kept.items()})

    def report(self, samples: Sequence[Sample], settings: Settings) -> EvaluationReport:
        """Whole answers under settings and of the uncompressed model, see [`evaluate`]."""

        def make(batch: Sequence[Sample], missing: Settings) -> dict[str, Any]:
            wanted = [Setting(name, dict(fields)) for name, fields in missing.items()]
            model, processor = self.model, self.processor
            report = evaluate(
                model, processor, batch, wanted, batch_size=_BATCH, max_new_tokens=NEW_TOKENS, progress=False
            )
            results = report.results
            pairs = {name: (results[name].answers, results[name].tokens.tolist()) for name in missing}
            return {name: list(zip(*columns, strict=True)) for name, columns in pairs.items()}

        off = parse_setting(OFF)
        kept = self.kept("answers", samples, {off.name: off.fields, **settings}, make)
        results = {}
        for name, rows in kept.items():
            answers, tokens = zip(*rows, strict=True)
            results[name] = result_of(name, answers, is_right(samples, answers), tokens)
        return EvaluationReport.of_samples(samples, results, off.name)

    def kept(self, what: str, samples: Sequence[Sample], settings: Settings, make: Make) -> dict[str, list[Any]]:
        """Rows of settings by name, one for each question; missing ones are made and kept.

        Args:
            what: A name for this kind of row.
            samples: The questions. Those of a last, shorter piece are made again where more questions are asked.
            settings: Fields of `token_recovery` by the name of the setting; names may change.
            make: Makes the rows of a batch of questions under some of the settings, by name.
        """
        found: dict[str, list[Any]] = {name: [] for name in settings}
        with progress_bar(len(samples), what) as bar:
            for start in range(0, len(samples), _PIECE):
                piece = samples[start : start + _PIECE]
                asked = [*self._about, what, [(sample.picture, sample.question) for sample in piece]]
                keys = {name: _digest([*asked, fields]) for name, fields in settings.items()}
                missing = {name: settings[name] for name, key in keys.items() if key not in self._lines}
                made: dict[str, list[Any]] = {name: [] for name in missing}
                for first in range(0, len(piece), _BATCH):
                    batch = piece[first : first + _BATCH]
                    for name, rows in make(batch, missing).items() if missing else ():
                        made[name] += rows
                    bar.update(len(batch))
                if missing:
                    self._keep({keys[name]: rows for name, rows in made.items()})
                for name, key in keys.items():
                    found[name] += self._lines[key]
        return found

    def _keep(self, lines: Mapping[str, Any]) -> None:
        self._lines |= lines
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines("\n" + json.dumps(pair) for pair in lines.items())


def experiment_arguments(
    description: str, questions: int, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the command line of an experiment that chooses on validation scenes and reports on held-out ones.

    Args:
        description: Description of the experiment, for its help.
        questions: Number of held-out questions by default.
        arguments: The arguments; `None` for those of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", choices=CHECKPOINTS)
    parser.add_argument("--chosen-on", type=int, default=400, metavar="N", help="validation questions")
    parser.add_argument("--questions", type=int, default=questions, metavar="N", help="held-out questions")
    add_kept_file(parser)
    return parser.parse_args(arguments)


def add_kept_file(parser: argparse.ArgumentParser) -> None:
    """Add the option `--keep`, the file of [`KeptAnswers`]."""
    keep = "keep what was measured in this file of JSON lines; the same command resumes"
    parser.add_argument("--keep", type=output_file, metavar="FILE", help=keep)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def is_right(samples: Sequence[Sample], answers: Sequence[str]) -> Any:
    """(Q,) bool, answers that equal an expected one."""
    pairs = zip(samples, answers, strict=True)
    return np.array([normalize_answer(answer) in map(normalize_answer, sample.answers) for sample, answer in pairs])


def result_of(name: str, answers: Sequence[str], right: Any, tokens: Any) -> SettingResult:
    """A result of which only answers and tokens are known; without answers, whether they are right."""
    unknown = np.full(len(right), np.nan)
    return SettingResult(name, {}, list(answers), np.array(right), np.array(tokens), float("nan"), unknown, unknown)


__all__ = ["NEW_TOKENS", "KeptAnswers", "Make", "add_kept_file", "experiment_arguments", "is_right", "result_of"]
