"""Conversations about the demo's scenes: what is asked, what is counted, and what is told."""

import json

import numpy as np
import pytest
from demo_model import demo_model

from reccomp_hf.demo import EVALUATION_SEEDS, draw_scene
from reccomp_hf.experiments import conversations
from reccomp_hf.experiments.conversations import demo_dialogues, evaluate_dialogues
from reccomp_hf.measure.evaluation.samples import normalize_answer

SETTING = "text:16+position_ids=original"


@pytest.fixture(scope="module")
def report():
    return evaluate_dialogues(*demo_model(), demo_dialogues(4), SETTING, max_new_tokens=1, progress=False)


def test_every_question_is_about_another_object():
    dialogues = demo_dialogues(60)
    assert [dialogue.picture for dialogue in dialogues] == [str(seed) for seed in EVALUATION_SEEDS[:60]]
    assert {len(dialogue.questions) for dialogue in dialogues} == {2, 3, 4}
    asked = {
        (question.kind, question.answer in ("yes", "no")) for dialogue in dialogues for question in dialogue.questions
    }
    assert asked == {("color", False), ("shape", False), ("read", False), ("exist", True)}
    for dialogue in dialogues:
        objects = draw_scene(int(dialogue.picture)).objects
        about = [question.object_index for question in dialogue.questions if question.object_index is not None]
        assert len({*about}) == len(about)
        assert len(dialogue.questions) == min(4, len(objects))
        for question in dialogue.questions:
            if question.object_index is not None:
                item = objects[question.object_index]
                assert question.answer in (item.color, item.shape, item.letter, "yes")
    assert [question.text for question in dialogues[7].questions] == [
        question.text for question in demo_dialogues(1, skip=7)[0].questions
    ]


def test_runs_and_turns(report):
    runs = ["off", f"keep {SETTING}", f"append {SETTING}", f"rebuild {SETTING}"]
    assert list(report.figures) == list(report.answers.results) == runs
    lengths = [len(dialogue.questions) for dialogue in demo_dialogues(4)]
    assert report.answers.kinds == [f"turn {turn + 1}" for length in lengths for turn in range(length)]
    off, keep, append, rebuild = (report.figures[run] for run in runs)
    first = np.array(report.answers.kinds) == "turn 1"
    assert {*off["visual_tokens"]} == {144}
    assert {*keep["visual_tokens"]} == {*rebuild["visual_tokens"]} == {16}
    assert (append["visual_tokens"][first] == 16).all()
    assert (append["recovered"][~first] > 0).all()
    for figures in (keep, append, rebuild):
        assert (figures["recovered"][first] == 16).all()
        for name in ("prefilled", "visual_tokens", "cache_length"):
            assert (figures[name][first] == keep[name][first]).all()
    assert (keep["prefilled"][~first] == off["prefilled"][~first]).all()
    assert (append["prefilled"] - keep["prefilled"])[~first].tolist() == append["recovered"][~first].tolist()
    assert (rebuild["prefilled"] == rebuild["cache_length"]).all()  # one new token each, which is not read
    assert (keep["cache_length"] == rebuild["cache_length"]).all()
    answers = {run: np.array(report.answers.results[run].answers)[first].tolist() for run in runs[1:]}
    assert len({*map(tuple, answers.values())}) == 1
    assert (report.figures["off"]["milliseconds"] > 0).all()


def test_tables_and_json(report):
    pairs = conversations._compared(report)
    assert pairs == [(f"append {SETTING}", f"keep {SETTING}"), (f"rebuild {SETTING}", f"keep {SETTING}")]
    text = report.markdown(pairs)
    assert len(text.split("\n\n")) == 3
    assert f"append {SETTING} minus keep {SETTING}" in text
    facts = json.loads(json.dumps(report.to_dict(pairs)))
    assert facts["figures"]["off"]["visual_tokens"]["turn 2"] == 144
    assert facts["questions"] == len(facts["answers"]) == len(report.kinds)
    row = facts["answers"][1]
    assert (row["turn"], row["kind"]) == ("turn 2", report.kinds[1])
    assert row["given"]["off"]["visual_tokens"] == 144
    questions = [question for dialogue in demo_dialogues(4) for question in dialogue.questions]
    right = [
        normalize_answer(row["given"]["off"]["answer"]) == q.answer.lower()
        for row, q in zip(facts["answers"], questions, strict=True)
    ]
    assert right == [row["given"]["off"]["right"] for row in facts["answers"]]
    assert sum(right) > len(right) / 2


def test_the_command(tmp_path, capsys):
    options = ["--settings", SETTING, "--modes", "append", "--limit", "1", "--max-new-tokens", "1"]
    written = tmp_path / "out.json"
    assert conversations.main(["demo", *options, "--max-visual-tokens", "16", "--json", str(written)]) == 0
    output = capsys.readouterr().out
    assert "demo: 1 conversations" in output
    assert f"append {SETTING}" in output
    figures = json.loads(written.read_text())["figures"]
    assert {*figures[f"append {SETTING}"]["visual_tokens"].values()} == {16}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"modes": ["add"]}, "Unknown mode 'add'; write some of rebuild, append, keep"),
        ({"settings": "txt:16"}, "Unknown setting 'txt'"),
        ({"dialogues": []}, "There must be conversations"),
        ({"settings": "authors", "modes": ["append"]}, "mode='rebuild' or 'keep'"),
    ],
)
def test_refusals(arguments, match):
    with pytest.raises(ValueError, match=match):
        evaluate_dialogues(*demo_model(), **{"dialogues": demo_dialogues(1), "settings": SETTING, **arguments})


@pytest.mark.parametrize(("limit", "skip"), [(0, 0), (1, -1), (2, len(EVALUATION_SEEDS) - 1)])
def test_scenes_that_are_not_there(limit, skip):
    with pytest.raises(ValueError, match="limit >= 1 and a skip >= 0"):
        demo_dialogues(limit, skip)
