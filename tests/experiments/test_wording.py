"""The experiment about wording: every wording asks the same, and a kind that is left out is not looked at."""

import dataclasses

import numpy as np
import pytest

from reccomp_hf.experiments import tuning, wording
from reccomp_hf.measure.evaluation import demo_samples


def test_questions_are_reworded_and_ask_the_same():
    samples = demo_samples(240)
    varied = wording.reworded(samples, 0)
    assert varied == wording.reworded(samples, 0) != wording.reworded(samples, 1)
    for before, after in zip(samples, varied, strict=True):
        assert (before.picture, before.answers, before.kind) == (after.picture, after.answers, after.kind)
        asked = before.question.rstrip("?").split()[3:] if before.kind in ("color", "shape") else []
        assert set(asked) - {"the"} <= set(after.question.rstrip(".?").split())
    for kind in wording.WORDINGS:
        assert len({sample.question[:9] for sample in varied if sample.kind == kind}) >= 5
    assert np.mean([before.question == after.question for before, after in zip(samples, varied, strict=True)]) < 0.3
    with pytest.raises(ValueError, match=r"must read 'What color is the \{\}"):
        wording.reworded([dataclasses.replace(samples[0], question="Which color?")], 0)


def test_a_small_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FEW", ("balanced",))
    for module in (tuning, wording):
        monkeypatch.setattr(module, "REPORTED_BUDGETS", (7,))
    text = wording.run("demo", 24, 12, tmp_path / "kept.jsonl")
    assert "| 7: tuned by question, chosen in six wordings " in text
    rows = [line for line in text.splitlines() if line.startswith("| 7: ")]
    assert [row.split("|")[1].strip() for row in rows[-5:]] == [f"7: {kind}" for kind in wording.WORDINGS]
    assert wording.run("demo", 24, 12, tmp_path / "kept.jsonl") == text  # from the file
