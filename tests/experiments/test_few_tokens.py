"""The experiment about few tokens: grades are those of generation, runs resume, and the tables say who is ahead."""

import numpy as np
import pytest
import torch
from demo_model import demo_model

from reccomp_hf.experiments import kept_answers
from reccomp_hf.experiments.front import measuring as front
from reccomp_hf.experiments.front import reporting
from reccomp_hf.measure.evaluation import demo_samples, evaluate
from reccomp_hf.measure.evaluation.settings import parse_setting

NAMES = front.front_settings(("balanced", "divprune", "cdpruner+position_ids=original"), (4, 14))


def test_grades_are_those_of_generation():
    model, processor = demo_model()
    samples = demo_samples(24)
    found = front.measured(model, processor, samples, {name: parse_setting(name).fields for name in NAMES})
    for tokens, least in ((1, front.BEGUN), (3, front.WHOLE)):
        report = evaluate(model, processor, samples, NAMES, max_new_tokens=tokens)
        for name, rows in found.items():
            assert [grade >= least for grade, _ in rows] == report.results[name].right.tolist(), (name, tokens)
            assert [count for _, count in rows] == report.results[name].tokens.tolist(), name
    assert {grade for rows in found.values() for grade, _ in rows} >= {front.WRONG, front.WHOLE}


@pytest.mark.parametrize(
    ("predicted", "grade"),
    [([5, 2, 9], front.WHOLE), ([5, 6, 9], front.BEGUN), ([6, 2, 9], front.WRONG), ([6, 6, 9], front.WRONG)],
)
def test_an_answer_is_graded_up_to_its_end(predicted, grade):
    """Tokens after the end do not count; the answer is 5, and 2 ends it."""
    counted = torch.tensor([[True, True, False]])
    assert front.graded(torch.tensor([predicted]), torch.tensor([[5, 2, 2]]), counted) == [grade]


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
    """Of more questions and new settings only they are measured."""
    monkeypatch.setattr(kept_answers, "_BATCH", 6)
    monkeypatch.setattr(kept_answers, "_PIECE", 12)
    first, whole = front.run("demo", 12, tmp_path / "file", NAMES[:-1])
    calls, measured = [], front.measured
    monkeypatch.setattr(front, "measured", lambda *given: calls.append(given[2:]) or measured(*given))
    longer, _ = front.run("demo", 24, tmp_path / "file", NAMES)
    assert [(len(batch), list(settings)) for batch, settings in calls] == [(6, NAMES[-1:])] * 2 + [(6, NAMES)] * 2
    assert len(longer.questions) == 24
    for name in NAMES[:-1]:
        assert (longer.results[name].right[:12] == first.results[name].right).all()
        assert (longer.results[name].tokens[:12] == first.results[name].tokens).all()
        assert (whole.results[name].right <= first.results[name].right).all()
    calls.clear()
    again, _ = front.run("demo", 24, tmp_path / "file", NAMES)
    assert calls == []
    assert all((again.results[name].right == longer.results[name].right).all() for name in NAMES)


def test_the_tables_name_who_is_ahead():
    samples = demo_samples(48)
    right = {"off": 1.0, "balanced:4": 0.9, "divprune:4": 0.4, "scope:4": 0.9, "scope:4+position_ids=original": 1.0}
    draws = np.random.default_rng(0).random(48)
    rows = {name: [(2 * int(draw < share), 4) for draw in draws] for name, share in right.items()}
    report = front.report_of(samples, rows, front.WHOLE)
    losses = list(reporting.not_ahead(report, (4,)))
    assert [(name, budget) for name, budget, _ in losses] == [("scope", 4), ("scope+position_ids=original", 4)]
    text = reporting.tables(report, report, (4,))
    assert "48 questions on " in text
    assert "| scope, original positions" in text
    assert "Not ahead outside the interval, 2 of 3 cases" in text


def test_the_plot_has_a_panel_for_each_form():
    pytest.importorskip("matplotlib", reason="the plot needs it")
    samples = demo_samples(12)
    names = [f"{name}:{budget}" for budget in (4, 14) for name in ("balanced", "divprune")]
    names = ("off", *names, *(f"divprune:{budget}+position_ids=original" for budget in (4, 14)))
    rows = {name: [(2, 4)] * 12 for name in names}
    figure = reporting.plot_front(front.report_of(samples, rows, front.WHOLE), (4, 14))
    labels = [axis.get_legend_handles_labels()[1] for axis in figure.axes]
    assert labels == [["uncompressed", "balanced", "divprune"]] * 2
