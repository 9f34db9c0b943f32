"""Runs of `predict`: the order of rows, batches, several processes, and the command."""

import itertools
import json
import subprocess

import pytest
import torch
from architectures import each_architecture
from PIL import Image
from predictions import (
    COUNT,
    NEW_TOKENS,
    State,
    Waiting,
    ask,
    killed,
    launched,
    left,
    left_files,
    read_lines,
    write_lines,
)
from tiny import SENTENCES, pictures

from reccomp_hf.data import parts
from reccomp_hf.data.rows import open_rows
from reccomp_hf.engines.predict import Columns, predict, running
from reccomp_hf.engines.predict.batching import plan_batches
from reccomp_hf.engines.predict.questions import Questions

pytest_plugins = ("command_line", "prediction_runs")


# ---- order and batches ---------------------------------------------------------------------------------------------


def test_lines_are_in_the_order_of_the_data(data, wanted):
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    lines = [json.loads(line) for line in wanted.decode().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert [line["row"] for line in lines if "error" in line] == [3, 7]
    assert all(
        line["question"] == row["question"] for line, row in zip(lines, rows, strict=True) if "error" not in line
    )


@pytest.mark.parametrize("size", [1, 3, 64])
def test_answers_do_not_depend_on_the_batch(data, wanted, tmp_path, size):
    ask(data, tmp_path / "out.jsonl", batch_size=size)
    assert (tmp_path / "out.jsonl").read_bytes() == wanted


@each_architecture
def test_answers_of_every_architecture_do_not_depend_on_the_batch(architecture, tmp_path):
    """Pictures of several sizes, one or two a row, a dynamic budget, and answers as long as they may be."""
    for number, picture in enumerate(pictures(6)):
        picture.save(tmp_path / f"{number}.png")
    images = ["0.png", ["1.png", "2.png"], "3.png", "4.png", ["5.png", "0.png"]]
    rows = [{"image": image, "question": text} for image, text in zip(images, SENTENCES[:4] * 2, strict=False)]
    data, model, processor = (
        write_lines(tmp_path / "data.jsonl", rows),
        architecture.compressed(),
        architecture.processor(),
    )
    found = []
    for size in (1, 4):
        output = tmp_path / f"{size}.jsonl"
        predict(model, processor, data, output, batch_size=size, max_new_tokens=5, columns=Columns())
        found.append(read_lines(output))
    assert found[0] == found[1]
    for line, row in zip(found[0], rows, strict=True):
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        turn = [*[{"type": "image"}] * len(names), {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        opened = [pictures(6)[int(name[0])] for name in names]
        inputs = processor(images=opened, text=prompt, recovery_text=row["question"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert line["answer"] == processor.decode(ids, skip_special_tokens=True).strip()
        short, _ = model.compress_inputs(**inputs)
        counts = [int((ids == model.config.image_token_id).sum()) for ids in (short["input_ids"], inputs["input_ids"])]
        assert [line["visual_tokens"], line["uncompressed_visual_tokens"]] == counts
        assert counts[0] < counts[1]


@each_architecture
def test_batches_are_of_similar_length_and_the_longest_come_first(architecture, tmp_path):
    for number, size in enumerate([(40, 40), (90, 40), (80, 80)]):
        pictures(1)[0].resize(size).save(tmp_path / f"{number}.png")
    words = [3, 40, 7, 21, 1, 90, 12]
    rows = [{"image": f"{n % 3}.png", "question": "cat " * count} for n, count in enumerate(words)]
    rows.append({"image": ["0.png"] * 3, "question": "cat"})
    processor, model = architecture.processor(), architecture.build(budget=0.5)
    questions = Questions(open_rows(write_lines(tmp_path / "data.jsonl", rows)), Columns(), processor)
    plan = plan_batches(questions, model.config, model.config.token_recovery, processor, 3)
    assert not plan.bad_rows
    assert [len(batch) for batch in plan.batches] == [3, 3, 2]
    inputs = [_alone(processor, tmp_path, row) for row in rows]
    lengths = [int(model.compress_inputs(**one)[0]["attention_mask"].sum()) for one in inputs]
    real = [lengths[row] for batch in plan.batches for row in batch]
    assert all(later <= earlier + 8 for earlier, later in itertools.pairwise(real))  # newlines are an estimate
    assert real != lengths


def _alone(processor, folder, row):
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    opened = [Image.open(folder / name) for name in names]
    return processor(images=opened, text=f"USER: {'<image>' * len(names)}\n{row['question']}", return_tensors="pt")


# ---- several processes ----------------------------------------------------------------------------------------------


def test_several_processes_share_the_rows(data, wanted, tmp_path, monkeypatch):
    """Four processes, one after the other, up to where they wait; then one process finishes what they wrote."""
    output, found = tmp_path / "out.jsonl", []

    def broadcast(state, compute):
        if state.is_main_process:
            found.append(compute())
        return found[0]

    monkeypatch.setattr(running, "broadcast", broadcast)
    for index in range(4):
        state = State(index, 4)
        monkeypatch.setattr(running, "process_state", lambda device=None, state=state: state)
        with pytest.raises(Waiting):
            ask(data, output, batch_size=2)
    files = [path.read_text(encoding="utf-8").splitlines() for path in left_files(output)]
    assert len(files) == 4 and all(files)
    assert sorted(json.loads(line)["row"] for lines in files for line in lines) == list(range(COUNT))
    monkeypatch.undo()
    assert ask(data, output, batch_size=5).new == 0
    assert output.read_bytes() == wanted


def test_two_processes_of_accelerate_equal_one(data, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6)  # they go on from it
    given = len(parts.Parts(output).lines())
    command, environment = launched(
        2, data, "--model", "demo", "--max-new-tokens", NEW_TOKENS, "--output", output, "--batch-size", 2, "--json"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[:1000] + done.stderr[-1000:]
    facts = json.loads(done.stdout)
    assert (facts["processes"], facts["new"], facts["rows"]) == (2, COUNT - given, COUNT)
    assert output.read_bytes() == wanted and not left(output)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(run, error, data, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    common = ("predict", data, "--model", "demo", "--max-new-tokens", NEW_TOKENS, "--output", output)
    code, out, err = run(*common, "--batch-size", 5)
    assert code == 0 and output.read_bytes() == wanted
    assert out.startswith(f"Wrote {output}: {COUNT - 2} answers.\nA question read 16.0 of 144.0 visual tokens")
    assert f"{COUNT} rows in " in out and "(1 process)" in out
    assert err == f'reccomp-hf: warning: 2 of {COUNT} rows could not be answered: see "error" in {output}.\n'
    assert "is finished and was left unchanged" in error(*common)
    code, out, _ = run(*common, "--overwrite", "--json", "--set", "enabled=false", "--limit", 3)
    facts = json.loads(out)
    assert code == 0
    assert (facts["rows"], facts["answers"], facts["errors"], facts["new"]) == (3, 3, 0, 3)
    assert facts["visual_tokens"] == facts["uncompressed_visual_tokens"] == 144
    assert run(*common, "--overwrite", "--preset", "balanced", "--budget", "7")[0] == 0
    assert {line.get("visual_tokens") for line in read_lines(output)} == {7, None}


def test_a_run_in_which_nothing_was_answered_fails(error, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "none.png", "question": "What?"}\n')
    output = tmp_path / "out.jsonl"
    assert "1 of 1 rows could not be answered" in error("predict", data, "--model", "demo", "--output", output)
    assert "none.png cannot be read: no such file" in read_lines(output)[0]["error"]


def test_an_interrupted_run_says_what_is_kept(run, data, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("reccomp_hf.engines.predict.predict", interrupted)
    output = tmp_path / "out.jsonl"
    code, _, err = run("predict", data, "--model", "demo", "--output", output)
    assert code == 130 and f"{output}.parts keeps the answers so far; the same command resumes." in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_reported(error, data, tmp_path):
    said = error("predict", data, "--model", "demo", "--output", tmp_path / "out.jsonl", "--device", "cuda")
    assert "Use --device cpu." in said


def test_errors_of_the_command(error, data, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nothing is loaded for what cannot be")

    monkeypatch.setattr("reccomp_hf.checkpoints.loading.load", never)
    output = tmp_path / "out.jsonl"
    common = ("predict", data, "--model", "demo", "--output")
    assert "with --image-column, --question-column and --id-column" in error(*common, output, "--image-column", "x")
    assert "has no column 'text'" in error(*common, output, "--question-column", "text")
    assert "--batch-size: expected a whole number of at least 1, got '0'" in error(*common, output, "--batch-size", 0)
    assert "would be overwritten" in error(*common, data)
    assert "the folder of" in error(*common, tmp_path / "no" / "out.jsonl")
    assert "no such file or folder" in error("predict", tmp_path / "no", "--model", "demo", "--output", output)
    state = State(1, 2)
    monkeypatch.setattr("reccomp_hf.engines.predict.process_state", lambda device: state)
    assert "--device cuda:1 is for one process" in error(*common, output, "--device", "cuda:1")
    assert not list(tmp_path.iterdir())
