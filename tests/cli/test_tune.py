"""`reccomp-hf tune`, the files that it writes, and the commands that read them."""

import json
import shutil

import pytest
import tiny
from predictions import read_lines, save_pictures, write_lines

import reccomp_hf
from reccomp_hf.checkpoints.completeness import files_of
from reccomp_hf.checkpoints.tuning_record import write_section
from reccomp_hf.cli.options import file_fields
from reccomp_hf.demo import checkpoint_folder

pytest_plugins = ("command_line",)

FAST = ["--limit", "32", "--candidates", "balanced,divprune", "--max-new-tokens", "2"]
BEGINNING = {"begins": ["how many"], "budget": 36}


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo checkpoint with a section that is worth replacing."""
    shutil.copytree(checkpoint_folder("demo"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["token_recovery"] |= {"method": "random", "budget": 14, "position_ids": "compact"}
    path.write_text(json.dumps(config))
    return tmp_path / "model"


def test_a_section_file_is_written_and_read(run, tmp_path):
    output = tmp_path / "tuned.json"
    code, out, err = run("tune", "demo", "--budget", 14, *FAST, "--output", output, "--json", tmp_path / "all.json")
    assert code == 0 and "present section" in out and f"Wrote {output}." in out
    assert "warning: 32 questions are few" in err
    fields = file_fields(str(output))
    assert fields["budget"] == 14 and reccomp_hf.TokenRecoveryConfig(**fields).method == "recoverable"
    record = json.loads((tmp_path / "all.json").read_text())
    assert record == {"model": "demo", "data": "demo", **json.loads(output.read_text())["tuning"]}
    write_lines(tmp_path / "questions.jsonl", save_pictures(tmp_path, 2))
    answers = tmp_path / "answers.jsonl"
    options = ["--model", "demo", "--output", answers, "--max-new-tokens", 2]
    assert run("predict", tmp_path / "questions.jsonl", *options, "--section", output)[0] == 0
    assert [line["visual_tokens"] for line in read_lines(answers)] == [14, 14]
    code, _, err = run("tune", "demo", "--budget", 14, *FAST, "--output", output)
    assert code == 2 and "is finished and was left unchanged" in err


def test_a_section_with_rules_is_read_by_other_commands(run, tmp_path):
    section = tmp_path / "rules.json"
    section.write_text(json.dumps({"token_recovery": {"budget": 14, "rules": [BEGINNING]}}))
    rows = save_pictures(tmp_path, 4)
    rows[1]["question"] = "How many objects are there?"
    write_lines(tmp_path / "questions.jsonl", rows)
    answers = tmp_path / "answers.jsonl"
    options = ["--model", "demo", "--output", answers, "--max-new-tokens", 2, "--section", section]
    assert run("predict", tmp_path / "questions.jsonl", *options)[0] == 0
    lines = read_lines(answers)
    assert {line["visual_tokens"] for line in lines} == {14, 36}
    assert all((line["visual_tokens"] == 36) == line["question"].startswith("How many") for line in lines)


def test_commands_that_measure_take_a_section_file(run, error, tmp_path):
    section, found = tmp_path / "section.json", tmp_path / "found.json"
    fields = {"method": "divprune", "budget": 9, "rules": [BEGINNING]}
    section.write_text(json.dumps({"token_recovery": fields}))
    options = ["--section", section, "--json", found, "--max-new-tokens", 1, "--limit", 12]
    code, out, _ = run("eval", "demo", *options, "--settings", "balanced:14")
    assert code == 0 and 'stored, rule 0: "how many": budget 36' in out
    given = [row["given"]["stored"]["tokens"] for row in json.loads(found.read_text())["answers"]]
    kinds = [row["kind"] for row in json.loads(found.read_text())["answers"]]
    assert given == [36 if kind == "count" else 9 for kind in kinds]
    options = ["--batch-sizes", 1, "--budgets", 16, "--new-tokens", 1, "--repeats", 1, "--json", found]
    assert run("bench", "demo", *options, "--section", section)[0] == 0
    assert json.loads(found.read_text())["settings"]["token_recovery"]["method"] == "divprune"
    code, out, _ = run("cost", "demo", "--section", section, "--json")
    assert code == 0 and json.loads(out)["rows"][1]["visual_tokens"] == 36  # the most that a rule allows
    code, out, _ = run("cost", "--section", section, "--json")
    assert code == 0 and json.loads(out)["rows"][1]["visual_tokens"] == 36
    assert "give one of them" in error("cost", "--section", section, "--preset", "paper")
    assert "no such file" in error("eval", "demo", "--section", tmp_path / "none.json")


def test_a_checkpoint_is_converted_with_a_section_file(run, tmp_path):
    section, folders = tmp_path / "section.json", [tmp_path / "llava", tmp_path / "clip", tmp_path / "out"]
    tiny.save_stock(folders[0])
    tiny.save_clip(folders[1])
    fields = {"method": "divprune", "budget": 9, "rules": [BEGINNING]}
    section.write_text(json.dumps({"token_recovery": fields}))
    assert run("convert", *folders, "--section", section, "--set", "position_ids=original")[0] == 0
    written = reccomp_hf.TokenRecoveryConfig(**json.loads((folders[2] / "config.json").read_text())["token_recovery"])
    expected = reccomp_hf.TokenRecoveryConfig(**fields, position_ids="original")
    assert written.overridable() == expected.overridable()


def test_a_checkpoint_is_tuned_in_place(run, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, out, _ = run("tune", folder, *FAST, "--write")
    assert code == 0 and "'one for all' is taken" in out and f"reccomp-hf card {folder}" in out
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name for name in after if after[name] != before.get(name)} == {"config.json", "tuning.json"}
    config = json.loads(after["config.json"])
    assert config["token_recovery"]["method"] == "recoverable" and config["token_recovery"]["budget"] == 14
    assert config["token_recovery"]["text_encoder_config"]  # stays
    assert {**config, "token_recovery": 0} == {**json.loads(before["config.json"]), "token_recovery": 0}
    assert "tuning.json" in files_of(folder)
    code, card, _ = run("card", folder, "--stdout", "--no-measure")
    sentence = "Its settings were chosen by `reccomp-hf tune` on"
    assert code == 0 and sentence in " ".join(card.split())
    write_section(folder, {"budget": 15}, {})  # a record that does not say what was measured
    assert sentence not in " ".join(run("card", folder, "--stdout", "--no-measure")[1].split())


def test_a_finished_section_file_is_applied_later(run, error, folder, tmp_path):
    output = tmp_path / "tuned.json"
    asked = ["tune", folder, *FAST, "--output", output]
    assert run(*asked)[0] == 0
    before = (folder / "config.json").read_bytes()
    message = error(*asked, "--write")
    assert "is finished and was left unchanged" in message and f"tune {folder} --apply {output}" in message
    assert (folder / "config.json").read_bytes() == before
    code, out, _ = run("tune", folder, "--apply", output)
    assert code == 0 and "tuning.json" in out and f"reccomp-hf card {folder}" in out
    applied = [(folder / name).read_bytes() for name in ("config.json", "tuning.json")]
    config = json.loads(before)
    config["token_recovery"] |= file_fields(str(output))
    assert json.loads(applied[0]) == config
    assert "Its settings were chosen by `reccomp-hf tune`" in run("card", folder, "--stdout", "--no-measure")[1]

    content = json.loads(output.read_text())
    for changed, refused in (
        ({"token_recovery": {**content["token_recovery"], "budget": 145}}, "only 144 patches"),
        ({"tuning": None}, "has no record of tuning"),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**content, **changed}))
        assert refused in error("tune", folder, "--apply", tmp_path / "other.json")
    assert "--apply changes the config.json of a folder of yours" in error("tune", "demo", "--apply", output)
    assert [(folder / name).read_bytes() for name in ("config.json", "tuning.json")] == applied


def test_a_card_says_nothing_of_a_section_that_was_changed_afterwards(run, folder):
    assert run("tune", folder, *FAST, "--write", "--average", 14)[0] == 0
    card = " ".join(run("card", folder, "--stdout", "--no-measure")[1].split())
    assert "chosen by `reccomp-hf tune` (average 14) on" in card
    config = json.loads((folder / "config.json").read_text())
    config["token_recovery"]["budget"] = 22
    (folder / "config.json").write_text(json.dumps(config))
    assert "reccomp-hf tune" not in run("card", folder, "--stdout", "--no-measure")[1]


def test_questions_of_a_file_need_no_answers(run, tmp_path):
    rows = [{"image": row["image"], "question": row["question"]} for row in save_pictures(tmp_path, 12)]
    data = write_lines(tmp_path / "questions.jsonl", rows)
    options = ["--budget", 14, "--candidates", "divprune", "--max-new-tokens", 2]
    assert run("tune", "demo", "--data", data, *options)[0] == 0
    write_lines(data, [{"image": row["image"]} for row in rows])
    assert run("tune", "demo", "--data", data, *options, "--question", "How many objects are there?")[0] == 0
    code, _, err = run("tune", "demo", "--data", data, *options)
    assert code == 2 and "has no column 'question'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--write"], "--write changes the config.json of a folder of yours, got demo"),
        (["demo", "--budget", "dynamic"], "a dynamic number is not a budget; see --dynamic"),
        (["demo", "--budget", "14", "--agreement", "0.9"], "not allowed with argument"),
        (["demo", "--agreement", "95"], "agreement must be a share of the answers"),
        (["demo", "--dynamic"], "needs average"),
        (["demo", "--question", "Why?"], "asks one question of every row"),
        (["demo", "--candidates", "blanced", "--limit", "32"], "did you mean 'balanced'"),
        (["demo", "--data", "missing.jsonl"], "no such file or folder"),
        (["demo", "--limit", "6"], "Tuning needs questions on 4 images or more"),
        (["demo", "--set", "budgt=3"], "did you mean 'budget'"),
    ],
)
def test_what_tune_refuses(error, arguments, message):
    assert message in error("tune", *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "is not valid JSON"),
        ("[]", "holds no section"),
        ("{}", "holds no section"),
        ('{"token_recovery": 3}', "holds no section"),
        ('{"token_recovery": {"budgt": 3}}', "did you mean 'budget'"),
        ('{"token_recovery": {"rules": [{"budget": 3}]}}', 'rules[0] needs "begins"'),
    ],
)
def test_section_files_that_hold_none(error, tmp_path, content, message):
    path = tmp_path / "section.json"
    if content is not None:
        path.write_text(content)
    rest = ["--model", "demo", "--output", tmp_path / "out.jsonl"]
    data = write_lines(tmp_path / "questions.jsonl", save_pictures(tmp_path, 1))
    assert message in error("predict", data, *rest, "--section", path)
    assert "give one of them" in error("predict", data, *rest, "--section", path, "--preset", "paper")
