"""The results of an evaluation, with intervals that treat the questions on one image as dependent."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..intervals import Draws, Interval, interval
from ..tables import markdown_table
from .samples import Sample, normalize_answer

MEAN, ALL = "mean", "all questions"
_QUANTILES = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}
_Floats = npt.NDArray[np.float64]


@dataclasses.dataclass
class SettingResult:
    """One setting's answers to all questions, in their order.

    Attributes:
        name: The setting as the user wrote it.
        fields: Fields of `token_recovery` that the setting overrides.
        answers: The model's answers.
        right: Whether each answer equals an expected one, both normalised by `normalize_answer`.
        tokens: Visual tokens that the language model read for each question, LLaVA-NeXT's newlines included.
        seconds_per_sample: Time of compression and generation, without preparing image and prompt.
        object_recall: Share of the asked object's patches that was kept as it is; NaN where unknown.
        object_precision: Share of the kept patches that lies on the asked object; NaN where unknown.
    """

    name: str
    fields: dict[str, Any]
    answers: list[str]
    right: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    seconds_per_sample: float
    object_recall: _Floats
    object_precision: _Floats


@dataclasses.dataclass
class EvaluationReport:
    """All settings on the same questions.

    Intervals are percentiles of a bootstrap over images: all questions on a drawn image enter the draw. All settings
    share the draws, so differences are paired.

    Attributes:
        questions: The questions.
        kinds: The category of each question.
        pictures: The name of each question's image.
        results: Results by the name of the setting.
        reference: Name of the uncompressed setting.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """

    questions: list[str]
    kinds: list[str]
    pictures: list[str]
    results: dict[str, SettingResult]
    reference: str
    resamples: int = 1000
    seed: int = 0

    @classmethod
    def of_samples(
        cls, samples: Sequence[Sample], results: dict[str, SettingResult], reference: str
    ) -> EvaluationReport:
        """The report of results on these questions."""
        return cls(
            questions=[sample.question for sample in samples],
            kinds=[sample.kind for sample in samples],
            pictures=[sample.picture for sample in samples],
            results=results,
            reference=reference,
        )

    @property
    def kind_names(self) -> list[str]:
        """The kinds in the order of their first question."""
        return list(dict.fromkeys(self.kinds))

    def accuracy(self, name: str, kind: str = MEAN) -> Interval:
        """Share of right answers of one kind, of `ALL` questions, or the `MEAN` over the kinds."""
        return interval(self._shares(self._result(name).right, kind))

    def agreement(self, name: str) -> Interval:
        """Share of all questions that get the uncompressed model's answer, right or wrong."""
        reference = map(normalize_answer, self._result(self.reference).answers)
        pairs = zip(map(normalize_answer, self._result(name).answers), reference, strict=True)
        return interval(self._shares(np.array([ours == theirs for ours, theirs in pairs]), ALL))

    def difference(self, name: str, other: str, kind: str = MEAN) -> Interval:
        """Accuracy of one setting minus that of another, on the same draws of images."""
        ours, theirs = (self._shares(self._result(which).right, kind) for which in (name, other))
        return interval(ours - theirs)

    def object_hit(self, name: str) -> tuple[Interval, Interval] | None:
        """Mean recall and precision of the asked object's patches; `None` where they are unknown."""
        result = self._result(name)
        known = ~np.isnan(result.object_precision) & ~np.isnan(result.object_recall)
        if not known.any():
            return None
        values = (result.object_recall, result.object_precision)
        recall, precision = (interval(self._draws.ratio(np.where(known, value, 0), known)) for value in values)
        return recall, precision

    def to_dict(self, compare: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
        """Figures and all answers as JSON values, with the differences of the pairs in `compare`."""
        return {
            "questions": len(self.questions),
            "pictures": len(set(self.pictures)),
            "kinds": {kind: self.kinds.count(kind) for kind in self.kind_names},
            "reference": self.reference,
            "bootstrap": {"resamples": self.resamples, "seed": self.seed, "level": 0.95, "over": "pictures"},
            "settings": {name: self._setting_dict(name) for name in self.results},
            "differences": [
                {
                    "setting": name,
                    "minus": other,
                    **{kind: dataclasses.asdict(self.difference(name, other, kind)) for kind in self._columns},
                }
                for name, other in compare
            ],
            "answers": [
                {
                    "picture": self.pictures[row],
                    "kind": self.kinds[row],
                    "question": question,
                    "given": {
                        name: {
                            "answer": result.answers[row],
                            "right": bool(result.right[row]),
                            "tokens": int(result.tokens[row]),
                        }
                        for name, result in self.results.items()
                    },
                }
                for row, question in enumerate(self.questions)
            ],
        }

    def markdown(self, compare: Sequence[tuple[str, str]] = ()) -> str:
        """A table of the settings, and one of the pairs in `compare`."""
        hits = any(self.object_hit(name) for name in self.results)
        several = len(set(self.pictures)) > 1  # draws of one image are all equal
        head = ["setting", "visual tokens (10 to 90 %)", *self._columns, "agreement", "ms per question"]
        head += ["asked object kept", "kept on it"] if hits else []
        rows = [head]
        for name, result in self.results.items():
            low, high = np.quantile(result.tokens, (0.1, 0.9))
            spread = "" if low == high else f" ({low:.0f} to {high:.0f})"
            row = [name, f"{result.tokens.mean():.1f}{spread}"]
            row += [_cell(self.accuracy(name, kind), several and kind in (MEAN, ALL)) for kind in self._columns]
            row += [_cell(self.agreement(name)), f"{1000 * result.seconds_per_sample:.1f}"]
            if hits:
                hit = self.object_hit(name)
                row += ["-", "-"] if hit is None else [f"{part.value:.3f}" for part in hit]
            rows.append(row)
        lines = markdown_table(rows)
        if compare:
            rows = [["difference", *self._columns]]
            for name, other in compare:
                cells = [_cell(self.difference(name, other, kind), several, "+.3f") for kind in self._columns]
                rows.append([f"{name} minus {other}", *cells])
            lines += ["", *markdown_table(rows)]
        return "\n".join(lines)

    @property
    def _columns(self) -> list[str]:
        kinds = self.kind_names
        return [ALL] if len(kinds) == 1 else [*kinds, MEAN]

    def _setting_dict(self, name: str) -> dict[str, Any]:
        result, hit = self._result(name), self.object_hit(name)
        quantiles = {label: float(np.quantile(result.tokens, at)) for label, at in _QUANTILES.items()}
        return {
            "fields": result.fields,
            "accuracy": {kind: dataclasses.asdict(self.accuracy(name, kind)) for kind in [*self._columns, ALL]},
            "agreement": dataclasses.asdict(self.agreement(name)),
            "tokens": {"mean": float(result.tokens.mean()), **quantiles},
            "seconds_per_sample": result.seconds_per_sample,
            "object": None if hit is None else {"recall": vars(hit[0]), "precision": vars(hit[1])},
        }

    def _result(self, name: str) -> SettingResult:
        if name not in self.results:
            raise ValueError(f"No setting {name!r} was evaluated; there are {', '.join(self.results)}.")
        return self.results[name]

    @functools.cached_property
    def _draws(self) -> Draws:
        return Draws(self.pictures, self.resamples, self.seed)

    def _shares(self, right: npt.NDArray[np.bool_], kind: str) -> _Floats:
        """(1 + resamples,) share of `right`."""
        if kind == MEAN:
            return np.stack([self._shares(right, name) for name in self.kind_names]).mean(0)
        if kind != ALL and kind not in self.kinds:
            raise ValueError(f"No question is of kind {kind!r}; there are {', '.join(self.kind_names)}.")
        return self._draws.ratio(right, np.array([kind in (ALL, own) for own in self.kinds]))


def _cell(interval: Interval, with_interval: bool = False, form: str = ".3f") -> str:
    text = format(interval.value, form)
    return f"{text} [{interval.low:{form}}, {interval.high:{form}}]" if with_interval else text


__all__ = ["ALL", "MEAN", "EvaluationReport", "SettingResult"]
