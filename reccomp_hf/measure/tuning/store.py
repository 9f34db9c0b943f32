"""Measurements of batches, kept in a folder while a run lasts so that a killed one resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ... import __version__
from ...data.fingerprint import model_digest, processor_digest
from ...data.parts import Parts
from ..evaluation.samples import Sample
from .measuring import Measurement

Batch = dict[str, list[Measurement]]


class Store:
    """Measurements by the number of the batch.

    Args:
        parts: The folder of the run's output; `None` keeps them in memory.
        run: Everything that the measurements depend on, see `fingerprint`; those of another run that began in the same
            folder at the same time are not read.
    """

    def __init__(self, parts: Parts | None = None, run: Mapping[str, Any] | None = None) -> None:
        self._parts, self._run = parts, hashlib.sha256(json.dumps(run).encode()).hexdigest()
        self._batches: dict[int, Batch] = {}
        for row, line in {} if parts is None else parts.lines().items():
            stored = json.loads(line)
            if stored["run"] == self._run:
                measured = stored["measured"].items()
                self._batches[row] = {name: [Measurement(*one) for one in rows] for name, rows in measured}

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[int, Callable[[], Batch]], Batch]]:
        """A function that gives the measurements of a batch, and makes them with another one if there are none."""
        with contextlib.nullcontext() if self._parts is None else self._parts.writer(0) as write:

            def measured(number: int, make: Callable[[], Batch]) -> Batch:
                if number not in self._batches:
                    self._batches[number] = make()
                    if write is not None:
                        write([self._line(number)])
                return self._batches[number]

            yield measured

    def _line(self, number: int) -> str:
        batch = self._batches[number].items()
        rows = {name: [dataclasses.astuple(one) for one in measurements] for name, measurements in batch}
        return json.dumps({"row": number, "run": self._run, "measured": rows}) + "\n"


def fingerprint(model: Any, processor: Any, samples: Sequence[Sample], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that measurements depend on, as JSON values.

    Args:
        model: The model; its weights and config are digested.
        processor: The model's processor.
        samples: The questions; the pixels of their images are digested.
        asked: The arguments of the run.
    """
    digest, seen = hashlib.sha256(), set()
    for sample in samples:
        digest.update(json.dumps([sample.picture, sample.question]).encode())
        if sample.picture not in seen:
            seen.add(sample.picture)
            image = sample.open()
            digest.update(repr(image.size).encode() + image.tobytes())
    return {
        "version": __version__,
        "model": model_digest(model),
        "section": model.config.token_recovery.to_dict(),
        "processor": processor_digest(processor),
        "questions": digest.hexdigest(),
        "dtype": str(model.dtype),
        **asked,
    }


__all__ = ["Batch", "Store", "fingerprint"]
