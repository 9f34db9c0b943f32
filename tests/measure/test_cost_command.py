"""`reccomp-hf cost`: a table for people, JSON for scripts, errors in a line."""

import json

import pytest
from architectures import LLAVA

from reccomp_hf.cli.main import main


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["cost", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_papers_numbers_in_the_table(run):
    code, out, err = run("--visual-tokens", "56")
    assert (code, err) == (0, "")
    cells = {line[:32].strip(): line[32:].split() for line in out.splitlines() if line.startswith("  ")}
    assert cells["prefill, TFLOP"] == ["8.453", "1.510", "0.18x"]
    assert cells["prefill, ms"] == ["30.31", "9.24", "0.30x"]
    assert cells["memory traffic, GB"] == ["22.21", "14.36"]
    assert "llava-1.5-7b, 7.19 B parameters" in out and "not measured" in out
    assert max(map(len, out.splitlines())) <= 110


def test_json_for_scripts(run):
    code, out, err = run("--config", "llava-v1.6-mistral-7b", "--hardware", "rtx4090", "--dtype", "int4", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["name"], facts["hardware"]["name"], facts["dtype"]) == ("llava-v1.6-mistral-7b", "RTX 4090", "int4")
    assert (facts["picture"], facts["tiles"]) == ([640, 480], 5)
    assert [row["visual_tokens"] for row in facts["rows"]] == [2304, 64]


def test_settings_arrive(run):
    arguments = ("--preset", "paper", "--visual-tokens", "64", "128", "--batch", "4", "--text-tokens", "100", "--json")
    facts = json.loads(run(*arguments)[1])
    assert [row["prompt_tokens"] for row in facts["rows"]] == [676, 164, 228]
    assert facts["batch"] == 4
    tall = json.loads(run("--config", "llava-v1.6-vicuna-13b", "--picture", "480x640", "--json")[1])
    assert tall["rows"][0]["newline_tokens"] == 48


def test_a_checkpoints_own_settings(run, tmp_path):
    LLAVA.build(budget=25).config.save_pretrained(tmp_path)
    code, out, err = run(tmp_path, "--json")
    assert (code, err) == (0, "")
    assert [row["visual_tokens"] for row in json.loads(out)["rows"]] == [100, 25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "llava-2"], "Unknown configuration 'llava-2'; known ones are"),
        (["--hardware", "abacus"], "Unknown hardware 'abacus'"),
        (["--visual-tokens", "0"], "visual tokens must be 1 to 576"),
        (["--batch", "0"], "batch must be at least 1"),
        (["no/such/folder"], "no/such/folder is no folder"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "640"], "expected width x height as in 640x480, got '640'"),
        (["--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["--config", "llava-1.5-7b", "folder"], "not allowed with argument"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["cost", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_no_compressed_llava_is_refused(run, tmp_path):
    LLAVA.build(budget=25).config.save_pretrained(tmp_path)
    assert "--preset goes with --config" in run(tmp_path, "--preset", "paper")[2]
    LLAVA.shared_stock().config.save_pretrained(tmp_path)
    assert "is no compressed LLaVA: its model_type is 'llava'" in run(tmp_path)[2]
