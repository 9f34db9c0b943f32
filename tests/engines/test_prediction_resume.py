"""Runs of `predict` that are killed and resume, and runs that must not resume."""

import copy
import itertools
import os
import random
import shutil
import subprocess
import time

import psutil
import pytest
from demo_model import demo_model
from predictions import COUNT, NEW_TOKENS, ask, killed, launched, left, left_files, save_pictures, write_lines

from reccomp_hf.data import parts
from reccomp_hf.engines.predict import Columns, answering, predict

pytest_plugins = ("prediction_runs",)


# ---- runs that go on -----------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_anywhere_resumes(data, wanted, tmp_path):
    """Killed at every write, in the middle of it, and around every change of a file, then run again."""
    for steps in itertools.count():
        output = tmp_path / f"{steps}" / "out.jsonl"
        output.parent.mkdir()
        if not killed(data, output, steps):
            break
        assert not output.exists() or output.read_bytes() == wanted  # in one piece
        if left(output) or not output.exists():  # else it was killed when all was done
            done = ask(data, output, batch_size=1 + steps % 5)
            assert done.rows == COUNT and not left(output)
        assert output.read_bytes() == wanted, steps
    assert steps > 15


def test_a_run_that_is_killed_again_and_again_ends(data, wanted, tmp_path):
    output, kills = tmp_path / "out.jsonl", 0
    while killed(data, output, 3 + kills % 3, batch_size=2 + kills % 3):
        kills += 1
        assert kills < 50
    assert output.read_bytes() == wanted
    assert kills > 3


def test_only_what_is_missing_is_written(data, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6)
    done = sorted(parts.Parts(output).lines())
    assert 0 < len(done) < COUNT
    summary = ask(data, output)
    assert (summary.new, summary.rows) == (COUNT - len(done), COUNT)


def test_a_batch_that_lacks_a_row_is_read_whole(data, tmp_path, monkeypatch):
    """So that in half precision too its answers are the same."""
    output, seen = tmp_path / "out.jsonl", []
    answer = answering.ModelAnswerer.answer

    def watched(self, questions, inputs):
        seen.append([question.row for question in questions])
        return answer(self, questions, inputs)

    monkeypatch.setattr(answering.ModelAnswerer, "answer", watched)
    ask(data, tmp_path / "whole.jsonl")
    whole = list(seen)
    seen.clear()
    assert killed(data, output, 6)  # half of a batch is on the disk
    ask(data, output)
    assert {tuple(batch) for batch in seen} <= {tuple(batch) for batch in whole}
    assert len(whole) < len(seen)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_finished_output_is_left_alone(data, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"out\.jsonl is finished and was left unchanged: .* with --overwrite"):
        ask(data, output)
    assert output.read_text(encoding="utf-8") == "mine"
    ask(data, output, overwrite=True)
    assert output.read_bytes() == wanted


OTHERS = {
    "max_new_tokens": ({"max_new_tokens": 2}, r"max_new_tokens \(3 there, 2 here\)"),
    "instruction": ({"instruction": "Be brief."}, r"instruction \('' there, 'Be brief\.' here\)"),
    "budget": ({"token_recovery": {"budget": 9}}, r"token_recovery\.budget \(16 there, 9 here\)"),
    "limit": ({"limit": 10}, r"rows \(11 there, 10 here\)"),
    "question": ({"columns": Columns(asked="What?")}, r"asked \(None there, 'What\?' here\)"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_a_run_does_not_resume_with_other_settings(data, wanted, tmp_path, options, message):
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6)
    with pytest.raises(ValueError, match=rf"holds answers of another run, which differs in {message}\. Resume with"):
        ask(data, output, **options)
    ask(data, output)
    assert output.read_bytes() == wanted


def test_a_run_does_not_resume_with_another_model_or_other_data(data, wanted, tmp_path):
    rows = tmp_path / "data.jsonl"
    for path in data.parent.iterdir():
        shutil.copy(path, tmp_path)
    output = tmp_path / "out.jsonl"
    assert killed(rows, output, 6)
    model, processor = demo_model()
    trained = copy.deepcopy(model)
    trained.lm_head.weight.data[0, 0] += 0.01
    options = {"max_new_tokens": NEW_TOKENS}
    with pytest.raises(ValueError, match=r"which differs in model \("):
        predict(trained, processor, rows, output, **options)
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(ValueError, match=r"which differs in dtype \('float32' there, 'bfloat16' here\), and in model"):
        predict(half, processor, rows, output, **options)
    before = rows.read_text(encoding="utf-8")
    rows.write_text(before.replace("circle", "square", 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"which differs in data \("):
        ask(rows, output)
    rows.write_text(before, encoding="utf-8")
    ask(rows, output)
    assert output.read_bytes() == wanted


def test_a_run_does_not_resume_with_images_of_another_folder(data, tmp_path):
    """The same text in another folder, where the names are those of other images; links are followed."""
    for path in data.parent.iterdir():
        shutil.copy2(path, tmp_path)
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6)
    with pytest.raises(ValueError, match=r"which differs in images \("):
        ask(tmp_path / data.name, output)
    linked = tmp_path / "linked"
    linked.symlink_to(data.parent)
    assert ask(linked / data.name, output).new < COUNT


def test_a_run_does_not_resume_with_changed_images(data, tmp_path):
    for path in data.parent.iterdir():
        shutil.copy2(path, tmp_path)
    output, rows = tmp_path / "out.jsonl", tmp_path / data.name
    assert killed(rows, output, 6)
    picture = next(tmp_path.glob("*.png"))
    times, content = picture.stat(), picture.read_bytes()
    for changed in (content + b"\0", content):
        picture.write_bytes(changed)
        with pytest.raises(ValueError, match=r"which differs in images \("):
            ask(rows, output)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ask(rows, output).new < COUNT


def test_a_run_does_not_resume_with_another_processor_or_version(data, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6)
    model, processor = demo_model()
    options = {"max_new_tokens": NEW_TOKENS}
    others = [copy.deepcopy(processor) for _ in range(4)]
    others[0].image_processor.image_mean = [0.5, 0.5, 0.5]
    others[1].recovery_max_length = 8
    others[2].tokenizer.add_tokens(["circle"])
    others[3].recovery_tokenizer.add_tokens(["circle"])
    for other in others:
        with pytest.raises(ValueError, match=r"which differs in processor \("):
            predict(model, other, data, output, **options)
    with monkeypatch.context() as patch:
        patch.setattr(answering, "__version__", "0.0.1")
        with pytest.raises(ValueError, match=r"which differs in reccomp_hf \('.*' there, '0\.0\.1' here\)"):
            ask(data, output)
    assert predict(model, copy.deepcopy(processor), data, output, **options).new < COUNT


def test_a_run_that_answered_nothing_does_not_block_other_settings(data, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="only 144 patches"):
        ask(data, output, token_recovery={"budget": 145})
    ask(data, output)
    assert output.read_bytes() == wanted


def test_overwrite_starts_over(data, wanted, tmp_path):
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6, max_new_tokens=1)
    done = ask(data, output, overwrite=True)
    assert output.read_bytes() == wanted
    assert done.new == COUNT


def test_a_damaged_folder_is_reported(data, tmp_path):
    output = tmp_path / "out.jsonl"
    assert killed(data, output, 6)
    (file, *_) = left_files(output)
    whole = file.read_bytes()
    file.write_bytes(b"\0\0\n" + whole)
    with pytest.raises(ValueError, match=r"is damaged at b'.*start over with --overwrite"):
        ask(data, output)
    file.write_bytes(whole)
    (output.with_name("out.jsonl.parts") / parts.FINGERPRINT).unlink()
    with pytest.raises(ValueError, match=r"lacks its run\.json: start over"):
        ask(data, output)


def test_rows_that_vanish_are_reported(data, tmp_path, monkeypatch):
    output, prefetch = tmp_path / "out.jsonl", answering.prefetch

    def vanishing(items, prepare):
        yield from prefetch(items, prepare)
        for file in left_files(output):
            file.unlink()

    monkeypatch.setattr(answering, "prefetch", vanishing)
    with pytest.raises(RuntimeError, match=f"{COUNT} of {COUNT} rows are not in .*Run the same command again"):
        ask(data, output)
    assert not output.exists()


def test_a_real_error_stops_the_run(data, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    model, _ = demo_model()
    monkeypatch.setattr(type(model), "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(data, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# ---- real kills ----------------------------------------------------------------------------------------------------

MANY = 60


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More questions, and the output of one undisturbed run in a process of its own."""
    folder = tmp_path_factory.mktemp("many")
    rows = save_pictures(folder, MANY)
    rows[5]["question"], rows[50]["image"] = "", "missing.png"
    data = write_lines(folder / "data.jsonl", rows)
    assert start(data, folder.parent / "wanted.jsonl", 1, 4).wait() == 0
    return data, (folder.parent / "wanted.jsonl").read_bytes()


def start(data, output, processes, batch_size):
    command, environment = launched(
        processes,
        data,
        "--model",
        "demo",
        "--max-new-tokens",
        NEW_TOKENS,
        "--output",
        output,
        "--batch-size",
        batch_size,
    )
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def written(output):
    """Whole lines of all files."""
    return sum(path.read_bytes().count(b"\n") for path in left_files(output))


def with_children(process):
    """A started command and all that it started, itself first."""
    try:
        family = psutil.Process(process.pid)
        return [family, *family.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(family):
    """SIGKILL for all of them."""
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def finish(data, output, processes, batch_size):
    process = start(data, output, processes, batch_size)
    assert process.wait(timeout=300) == 0, output.with_suffix(".log").read_text(encoding="utf-8")[-3000:]


@pytest.mark.slow
def test_ten_real_kills_change_nothing(many, tmp_path):
    """One or two processes are killed after some lines, or about when the output is put together, ten times."""
    (data, wanted), output, chance, kills = many, tmp_path / "out.jsonl", random.Random(0), []
    for number in range(10):
        if output.exists():
            break
        before = written(output)
        target = min(MANY, before + chance.randint(1, 6) if number < 8 else MANY)
        processes, batch_size = chance.choice([1, 2]), chance.choice([1, 2, 3, 5])
        process = start(data, output, processes, batch_size)
        while process.poll() is None and written(output) < target and not output.exists():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        family = with_children(process)
        ended = process.poll()
        end(family)
        process.wait()
        kills.append((processes, batch_size, before, written(output), ended))
        assert ended in (None, 0), output.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        assert not output.exists() or output.read_bytes() == wanted  # in one piece
    assert sum(ended is None for *_, ended in kills) >= 8, kills
    assert {processes for processes, *_ in kills} == {1, 2}
    if not output.exists() or output.with_name("out.jsonl.parts").exists():
        finish(data, output, 2, 4)
    assert output.read_bytes() == wanted and not left(output)


@pytest.mark.slow
def test_processes_that_outlive_their_launcher_do_no_harm(many, tmp_path):
    """Only the launcher is killed; its processes live on while the same command runs again."""
    (data, wanted), output = many, tmp_path / "out.jsonl"
    process = start(data, output, 2, 1)
    while not written(output):
        time.sleep(0.001)
    family = with_children(process)
    process.kill()
    process.wait()
    try:
        again = start(data, output, 1, 3)
        again.wait(timeout=300)
    finally:
        end(family)
    if not output.exists() or left(output):  # who was last may have found the other's work gone
        finish(data, output, 1, 3)
    assert output.read_bytes() == wanted and not left(output)
