"""The experiment about tuning: settings are chosen on validation scenes, and every question gets its own setting."""

import numpy as np
from demo_model import demo_model

from reccomp_hf.experiments import tuning
from reccomp_hf.measure.evaluation import demo_samples, evaluate
from reccomp_hf.measure.tuning.choosing import Plan


def test_a_plan_is_reported_with_the_answers_of_its_settings():
    model, processor = demo_model()
    samples = demo_samples(24)
    report = evaluate(model, processor, samples, "off,balanced:4,balanced:36", max_new_tokens=2)
    plan = Plan("balanced:4", {"how many": "balanced:36"})
    both = tuning.combined(report, {"plan": plan})
    counts = [sample.question.startswith("How many") for sample in samples]
    assert both.results["plan"].tokens.tolist() == [36 if counted else 4 for counted in counts]
    for name, part in (("balanced:36", np.array(counts)), ("balanced:4", ~np.array(counts))):
        assert (both.results["plan"].right == report.results[name].right)[part].all()


def test_a_small_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "REPORTED_BUDGETS", (7,))
    monkeypatch.setattr(tuning, "FEW", ("balanced", "divprune"))
    monkeypatch.setattr(tuning, "PUBLISHED", ("paper", "divprune"))
    monkeypatch.setattr(tuning, "COUNTS", (12,))
    text = tuning.run("demo", 24, 12, tmp_path / "kept.jsonl")
    ways = [tuning.PAPER, tuning.BALANCED, tuning.ONE, tuning.KINDS, tuning.MEAN_BUDGET, tuning.LABELS, tuning.ORACLE]
    for way in ways:
        assert f"| 7: {way} " in text
    assert "| 7: best published in hindsight (" in text
    assert "14 settings were measured on 24 questions" in text
