"""`reccomp-hf demo` and `plot`: true answers, pictures with marks where they belong, and one-line errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from demo_model import demo_model
from PIL import Image
from torchao_noise import without_torchao

import reccomp_hf
from reccomp_hf.checkpoints.loading import load
from reccomp_hf.checkpoints.quiet import quiet
from reccomp_hf.cli.demo import demo_fields
from reccomp_hf.cli.image_questions import file_questions, scene_questions
from reccomp_hf.data.prompts import encode_rows
from reccomp_hf.demo import EVALUATION_SEEDS, draw_scene
from reccomp_hf.measure.plot import COLORS, plot_recovery

pytest_plugins = ("command_line",)

COUNTS = ("visual", "text", "coverage", "merged")
LONG_QUESTION = "Is there a red circle anywhere near the upper left corner of this picture of mine?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "few"], "a share of them or 'dynamic', got 'few'"),
        (["--budget", "0"], "a share of them or 'dynamic', got '0'"),
        (["--budget", "145"], "only 144 patches"),
        (["--preset", "authors", "--budget", "8"], "method 'authors' fixes the number of tokens itself"),
        (["--seed", "-1"], "A seed must be 0 or more, got -1"),
        (["--seed", "1", "--image", "a.png"], "not allowed with argument"),
        (["--image", "no-such.png"], "no-such.png cannot be read as an image: no such file"),
        (["--image", __file__], "cannot be read as an image: cannot identify image file"),
        (["--question", " "], "A question is empty"),
        (["--output", "."], ". is a folder, expected a file"),
        (["--output", "picture.txt"], "expected a file that ends in .png"),
        (["--output", "nowhere/picture.png"], "the folder of nowhere/picture.png does not exist"),
    ],
)
def test_demo_errors(error, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error("demo", *arguments)
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(error, sources):
    for name in ("demo", "plot", "eval"):
        model = ["--model"] if name == "demo" else []
        asked = ["--image", "x.png", "--question", "?"] if name == "plot" else []
        image = tiny.pictures(1)[0]
        image.save(sources[0].parent / "x.png")
        asked = [str(sources[0].parent / part) if part == "x.png" else part for part in asked]
        assert "is a stock LLaVA" in error(name, *model, sources[0], *asked)
        assert "not a compressed LLaVA: its model_type is 'clip'" in error(name, *model, sources[1], *asked)


def test_a_truncated_picture_is_one_line(error, tmp_path):
    tiny.pictures(1)[0].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    assert "half.png cannot be read as an image: " in error("demo", "--image", tmp_path / "half.png")


# ---- demo and plot -------------------------------------------------------------------------------------------------


def check_counts(answers):
    for answer in answers:
        tokens = answer["tokens"]
        assert sum(tokens[name] for name in COUNTS) == tokens["total"]
        assert tokens["of"] == 144
        assert tokens["share"] == pytest.approx(tokens["total"] / 144, abs=1e-4)


def check_marks(file, picture, fields):
    """The panels of a written picture show the frames and the darkness that the model's records ask for."""
    model, processor = demo_model()
    prompts = [f"USER: <image>\n{text} ASSISTANT:" for text in picture.questions]
    inputs = processor(images=[picture.image] * len(prompts), text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        records = model.recover(**inputs, token_recovery=fields)
    answers = ["x"] * len(prompts)
    texts = {"questions": picture.questions, "answers": answers, "title": "demo, preset balanced"}
    figure = plot_recovery(picture.image, records, processor=processor, **texts)
    figure.savefig(os.devnull, format="png")  # lays it out
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 400 and pixels.std() > 40
    frames = 0
    for axis, record in zip(figure.axes, records, strict=False):
        cell = axis.images[0].get_array().shape[1] / 12
        for patch in range(144):
            row, column = divmod(patch, 12)
            x, y = axis.transData.transform((column * cell + 0.8, row * cell + 3))  # frames may be corners
            pixel = pixels[len(pixels) - 1 - round(y), round(x)]
            kinds = [name for name in COUNTS[:3] if getattr(record, f"{name}_mask")[0, patch]]
            if kinds:
                frames += 1
                assert np.abs(pixel - np.array(COLORS[kinds[0]])).max() < 60, (patch, kinds, pixel)
            elif column and not record.cluster[0, patch - 1] >= 0:
                assert pixel.mean() < 110, (patch, pixel)
    assert frames == sum(int(record.counts.sum()) for record in records)


def test_demo_answers_from_a_ninth_of_the_tokens(tmp_path):
    package = str(Path(reccomp_hf.__file__).parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": package}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "reccomp_hf", "demo", "--json"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,  # a busy machine
        check=False,
    )
    assert (done.returncode, without_torchao(done.stderr)) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["seed"] == EVALUATION_SEEDS[0]
    assert facts["output"] == "reccomp-demo.png" and not list(tmp_path.rglob("*.safetensors"))
    answers = facts["answers"]
    check_counts(answers)
    assert all(answer["tokens"]["total"] == 16 for answer in answers)
    wanted = [answer for answer in answers if answer["question"].startswith(("What color", "Is there"))]
    assert len(wanted) == 3
    assert all(answer["compressed"] == answer["uncompressed"] == answer["expected"] for answer in wanted)
    check_marks(tmp_path / "reccomp-demo.png", scene_questions(), demo_fields("balanced"))


def test_demo_prints_a_table_and_draws(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("demo", "--preset", "paper", "--output", "here.png")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Model:")) <= 100
    assert "expected" in out and "visual tokens of 144" in out
    assert "of 144 visual tokens (" in out
    assert "Wrote here.png: " in out
    assert lines[-1].startswith("Next: README.md")
    assert Image.open("here.png").size[0] > 900
    assert list(tmp_path.iterdir()) == [tmp_path / "here.png"]


def test_demo_on_a_picture_with_questions_of_ones_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.pictures(1)[0].convert("P").save(tmp_path / "mine.png", transparency=bytes(range(100)))
    questions = ["--question", LONG_QUESTION, "How many?", "--question", "Is there a red circle?"]
    code, out, err = run("demo", "--image", "mine.png", *questions, "--budget", "8")
    assert (code, err) == (0, "")
    assert "expected" not in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("Model:")) <= 100
    assert "Reading 8 of 144 visual tokens (6%)" in out
    assert "= 8" in " ".join(out.split())
    assert "How many?" in out and "knows drawn shapes only" in out
    assert min(Image.open("reccomp-demo.png").size) > 400  # four panels in a row


def test_plot_draws_with_a_checkpoints_own_settings_or_others(run, error, converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.pictures(1)[0].save("mine.png")
    asked = ["--image", "mine.png", "--question", *tiny.SENTENCES[:2]]
    for options, tokens in (
        ([], 24),
        (["--budget", "9"], 9),
        (["--preset", "balanced"], 64),
        (["--set", "budget=0.5", "--set", "merged_tokens=0"], 50),
    ):
        code, out, err = run("plot", converted, *asked, *options)
        assert (code, err) == (0, "")
        assert out == "".join(
            [*(f"{tokens} tokens for: {question}\n" for question in tiny.SENTENCES[:2]), "Wrote reccomp-plot.png.\n"]
        )
        assert Image.open("reccomp-plot.png").size[0] > 900
    assert "token_recovery.enabled is false" in error("plot", converted, *asked, "--set", "enabled=false")
    assert "did you mean 'budget'" in error("plot", converted, *asked, "--set", "budgt=3")
    assert "only 100 patches" in error("plot", converted, *asked, "--budget", "101")


def test_ask_prints_what_generate_answers(run, error, converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, questions = tiny.pictures(1)[0], list(tiny.SENTENCES[:2])
    picture.save("mine.png")
    with quiet():
        model, processor = load(str(converted), {"budget": 9}, "cpu")
    wanted = []
    for override in ({}, {"enabled": False}):
        inputs = encode_rows(processor, [[picture]] * 2, questions, questions)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, token_recovery=override)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        wanted.append([answer.strip() for answer in answers])
    asked = ["ask", converted, "mine.png", *questions, "--max-new-tokens", "4"]
    code, out, err = run(*asked, "--budget", "9", "--compare", "--json", "--plot", "read.png")
    assert (code, err) == (0, "")
    rows = json.loads(out)["answers"]
    assert [row["question"] for row in rows] == questions
    assert [[row[name] for row in rows] for name in ("answer", "uncompressed")] == wanted
    assert {(row["visual_tokens"], row["of"]) for row in rows} == {(9, 100)}
    assert Image.open("read.png").size[0] > 900
    code, out, err = run(*asked, "--budget", "9")
    assert (code, err) == (0, "")
    assert out.count("  9 of 100 visual tokens were read\n") == 2 and "uncompressed" not in out
    rows = json.loads(run(*asked, "--set", "enabled=false", "--json")[1])["answers"]
    assert {(row["visual_tokens"], row["of"]) for row in rows} == {(100, 100)}
    assert "token_recovery.enabled is false" in error(*asked, "--set", "enabled=false", "--plot", "read.png")
    assert "is the input and would be overwritten" in error(*asked, "--plot", "mine.png")
    assert "no such file" in error("ask", converted, "other.png", "How many?")


def test_a_question_without_quotes_is_not_several(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.pictures(1)[0].save("mine.png")
    words = ["What", "color", "is", "it?"]
    for command in (["ask", "demo", "mine.png", *words], ["demo", "--question", *words]):
        assert "4 questions of one word each" in error(*command)
    assert not (tmp_path / "reccomp-demo.png").exists()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (300, 2)])
def test_pictures_of_any_size_and_mode_become_rgb(tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "picture.tif")
    picture = file_questions(str(tmp_path / "picture.tif"))
    assert picture.image.mode == "RGB"
    assert min(picture.image.size) >= 8
    assert picture.expected == [None] * len(picture.questions)


def test_the_input_is_not_overwritten(error, tmp_path):
    picture, data = tmp_path / "mine.png", tmp_path / "mine.jsonl"
    Image.new("RGB", (32, 32)).save(picture)
    data.write_text(json.dumps({"image": "mine.png", "question": "Is there a red circle?", "answers": ["no"]}) + "\n")
    before = picture.read_bytes(), data.read_bytes()
    asked = ["--image", str(picture), "--question", "Is there a red circle?", "--output", str(picture)]
    for words in (["demo", *asked], ["plot", "demo", *asked], ["eval", "demo", "--data", data, "--json", data]):
        assert "is the input and would be overwritten" in error(*words)
    assert (picture.read_bytes(), data.read_bytes()) == before


def test_a_shipped_checkpoint_has_its_name_everywhere(run):
    assert "144 become 16 (11%)" in run("info", "demo-global")[1]


def test_a_question_in_a_script_without_words_is_noted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("demo", "--question", "\u7ea2\u8272\u7684\u5706\u5728\u54ea\u91cc", "Is there a red circle?")
    assert code == 0 and out.count("Note: the text encoder has no words of the script of ") == 1


def test_the_demo_renders_a_system_message_without_a_role():
    _, processor = demo_model()
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Answer in one word."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "Answer in one word. USER: <image>\nIs it red? ASSISTANT:"


def test_a_question_that_leaves_no_position_for_an_answer(error, tmp_path):
    draw_scene(1).image.save(tmp_path / "scene.png")
    for fields in (["--set", "position_ids=compact"], ["--set", "position_ids=original"], ["--set", "enabled=false"]):
        message = error("ask", "demo", tmp_path / "scene.png", "word " * 600, "--max-new-tokens", 1, *fields)
        assert re.search(r"the prompt takes \d+ of the model's \d+ positions, and leaves none for an answer", message)
    assert "not valid Unicode" in error("ask", "demo", tmp_path / "scene.png", "what \udcff?")
