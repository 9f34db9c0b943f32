"""Model cards tell the truth: the counts are those of the whole model, and the code that they show runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
from architectures import LLAVA, each_architecture

from reccomp_hf.checkpoints.cards import render_card
from reccomp_hf.checkpoints.cards.probe import measure_tokens
from reccomp_hf.core.remote_code import write_remote_code
from reccomp_hf.demo import EVALUATION_SEEDS, checkpoint_folder, draw_scene, questions


def save(folder, architecture=LLAVA, **fields):
    architecture.build(**fields).save_pretrained(folder)
    architecture.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, with what a push adds to it."""
    path = tmp_path_factory.mktemp("demo") / "reccomp-demo"
    shutil.copytree(checkpoint_folder("demo"), path)
    write_remote_code(path)
    return path


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


# ---- measuring -----------------------------------------------------------------------------------------------------


@each_architecture
def test_counts_are_those_of_the_whole_model(architecture, tmp_path):
    path = save(tmp_path / "paper", architecture)
    counts = measure_tokens(path, scenes=3)
    whole = _counts_of_the_whole_model(architecture, 3)
    assert counts["mean"] == pytest.approx(sum(whole) / 3)
    assert (counts["least"], counts["most"], counts["pictures"]) == (min(whole), max(whole), 3)
    stages = sum(counts[name] for name in ("visual", "text", "coverage", "merged"))
    assert stages == pytest.approx(counts["mean"])
    assert counts["mean"] < counts["stock"]
    card = " ".join(
        render_card(path).split()
    )  # the count depends on the picture: it is measured without being asked for
    assert "Measured on 8 drawn scenes" in card and "on average" in card
    assert "was not measured for this card" in render_card(path, measure=False)


def _counts_of_the_whole_model(architecture, scenes):
    found = []
    for index, seed in enumerate(EVALUATION_SEEDS[:scenes]):
        scene = draw_scene(seed)
        question = questions(scene, seed)[index].text
        text = f"USER: <image>\n{question} ASSISTANT:"
        inputs = architecture.processor()(images=[scene.image], text=[text], return_tensors="pt")
        found += [int(record.counts.sum()) for record in architecture.compressed().recover(**inputs)]
    return found


def test_where_there_is_nothing_to_measure(tmp_path):
    folder, bare = save(tmp_path / "whole", budget=25), tmp_path / "bare"
    LLAVA.build(budget=25).config.save_pretrained(bare)
    assert measure_tokens(bare) is None
    assert "These counts follow from the settings." in render_card(bare, measure=True)
    assert "of 100 patches 25.0 tokens stay on average" in " ".join(render_card(folder, measure=True).split())
    assert "Measured" not in render_card(folder)  # 25 are always 25


# ---- the code that it shows ----------------------------------------------------------------------------------------


def test_the_code_runs(demo, tmp_path, monkeypatch, capsys):
    loading, remote = blocks(render_card(demo, repo="me/demo"))
    monkeypatch.chdir(tmp_path)
    tiny.pictures(1)[0].save("picture.jpg")
    names: dict[str, object] = {}
    exec(loading.replace("me/demo", str(demo)), names)
    assert capsys.readouterr().out.strip()
    assert names["model"].config.token_recovery.budget is not None
    assert remote.replace(", trust_remote_code=True", "").splitlines()[2:] == [
        line for line in loading.splitlines() if "from_pretrained" in line
    ]


def test_the_code_runs_without_the_package(demo, tmp_path):
    loading, remote = (block.replace("me/demo", str(demo)) for block in blocks(render_card(demo, repo="me/demo")))
    rest = loading.partition("processor = ")[2].partition("\n")[2]
    tiny.pictures(1)[0].save(tmp_path / "picture.jpg")
    hidden = "import sys\nsys.modules['reccomp_hf'] = None\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", hidden + remote + "from PIL import Image\n" + rest],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr
