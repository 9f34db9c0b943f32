"""The README's code runs, and the files, commands and modules that it names exist."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import LLAVA_NEXT
from chat_client import running
from demo_model import demo_model
from oracle_layout import packed_oracle
from paths import README, ROOT
from second_device import run_elsewhere

import reccomp_hf
from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.cli import main as cli
from reccomp_hf.core.layout import NEWLINE
from reccomp_hf.core.methods import registry
from reccomp_hf.core.methods.registry import get_method, method_names
from reccomp_hf.demo import checkpoint_folder, draw_scene
from reccomp_hf.engines.server.answering import Service
from reccomp_hf.measure.evaluation.settings import parse_settings


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks(text) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_first_snippets_run(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert capsys.readouterr().out.split("\n")[:2] == ["N", "tensor([16])"]
    exec(blocks[1].replace("llava-1.5-7b-reccomp", str(checkpoint_folder("demo"))), names)


@pytest.fixture
def own_method(blocks, monkeypatch):
    """The snippet's method, registered for the test, and the names of the first snippet."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (snippet,) = [block for block in blocks if "register_method" in block]
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    exec(snippet, names)
    return get_method("corners"), names


@torch.no_grad()
def test_the_method_of_ones_own_chooses_the_corners(own_method):
    _, names = own_method
    (record,) = names["model"].recover(**names["inputs"], token_recovery={"method": "corners", "budget": 4})
    assert record.places.tolist() == [[0, 11, 132, 143]]
    tiled = LLAVA_NEXT.build().recover(**LLAVA_NEXT.encode(), token_recovery={"method": "corners", "budget": 9})
    assert [int(record.counts.sum()) for record in tiled] == [9] * len(tiled)  # among all tiles of an image


@pytest.mark.parametrize("tiles", [None, [2, 1]], ids=["an image", "tiles"])
def test_the_method_of_ones_own_runs_on_another_device(own_method, tiles):
    method, _ = own_method
    assert run_elsewhere(method, TokenRecoveryConfig(method="corners", budget=4), tiles) == {"meta"}


def test_the_snippet_about_many_questions_runs(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_scene(1_000_000).image.save("sign.png")
    rows = [{"image": "sign.png", "question": "What letter is on the cyan sign?"}, {"question": "Where?"}]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (snippet,) = [block for block in blocks if "reccomp_hf.engines.predict" in block]
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    capsys.readouterr()
    exec(snippet, names)
    assert capsys.readouterr().out.startswith("1 1 16.0 ")
    assert json.loads(Path("answers.jsonl").read_text(encoding="utf-8").splitlines()[0])["answer"] == "N"


def test_the_commands_about_many_questions_are_understood(text):
    commands = re.findall(r"^(?:reccomp-hf|accelerate .* -m reccomp_hf) (predict .*)$", text, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert cli._parser().parse_args(shlex.split(command)).output.endswith(".jsonl")


def test_every_method_has_a_row(text):
    rows = re.findall(r"^\| (`\"[^|]*) \|", text, flags=re.MULTILINE)
    assert sorted(re.findall(r'`"(\w+)"`', " ".join(rows))) == sorted(set(method_names()) - {"recoverable"})


# PEFT and TRL read what transformers 5.23 renamed; the README's reader may have a GPU, for which memory is pinned.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
def test_the_training_snippet_runs(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (snippet,) = [block for block in blocks if "CompressedTrainerMixin" in block]
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    projected: list[int] = []
    watch = (
        "fresh.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))"
    )
    names["seen"] = projected
    exec(snippet.replace("options = SFTConfig", f"{watch}\noptions = SFTConfig"), names)
    assert projected == [16]
    assert any("lora_B" in name and value.any() for name, value in names["model"].named_parameters())
    assert type(names["small"].model.language_model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert type(names["small"].token_recovery.visual_projection.weight) is torch.nn.Parameter


def test_the_client_of_the_server_runs(blocks, monkeypatch, capsys):
    openai = pytest.importorskip("openai")
    (snippet,) = [block for block in blocks if "OpenAI(" in block]
    names: dict[str, Any] = {"draw_scene": draw_scene}
    with running(Service("demo", *demo_model())) as server:
        exec(snippet.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), names)
        names["client"].close()
    assert isinstance(names["client"], openai.OpenAI)
    assert capsys.readouterr().out == " N 31\n N"


def test_the_embeddings_are_made(blocks):
    (snippet,) = [block for block in blocks if "load_image_encoder" in block]
    names = {"reccomp_hf": reccomp_hf, "draw_scene": draw_scene, "folder": checkpoint_folder("demo")}
    exec(snippet, {**names, "processor": demo_model()[1]}, names)
    assert names["result"].embeds.shape == (16, 128) and names["result"].places is None
    assert names["part"]["type"] == "image_embeds"


def test_the_first_forty_lines_hold_what_a_newcomer_needs(text):
    top = "\n".join(text.splitlines()[:42])
    for needed in (
        "pip install . && reccomp-hf demo",
        'pip install -e ".[test]" && pytest',
        "from_pretrained",
        "| checkpoint |",
    ):
        assert needed in top


def test_the_commands_are_understood(text):
    listed = re.findall(r"^(?:.*&& )?reccomp-hf (.*)$", text, flags=re.M)
    named = re.findall(r"`reccomp-hf (\w+ [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    commands = [shlex.split(command, comments=True) for command in listed + named if "--help" not in command]
    assert {command[0] for command in commands} >= {
        "demo",
        "convert",
        "eval",
        "bench",
        "cost",
        "predict",
        "serve",
        "embed",
    }
    for command in commands:
        arguments = cli._parser().parse_args(command)
        if command[0] == "eval":
            assert parse_settings(arguments.settings)


def test_the_command_of_the_tables_covers_its_rows(text):
    (command,) = re.findall(r"^reccomp-hf (eval .*)$", text, flags=re.M)
    assert len(parse_settings(cli._parser().parse_args(shlex.split(command)).settings)) > 5


def test_the_stock_counts_of_llava_next_are_true(text):
    row = r"^\| (\d+) x (\d+) \| 1 \+ (\d) \| ([\d,]+) \+ (\d+) = ([\d,]+) \|"
    rows = re.findall(row, text, flags=re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        width, height, tiles, patches, newlines, total = (int(cell.replace(",", "")) for cell in row)
        order, _, count = packed_oracle((height, width))
        assert (len(order), count) == (total, tiles + 1)
        assert (sum(slot != NEWLINE for slot in order), order.count(NEWLINE)) == (patches, newlines)


# ---- paths and names -----------------------------------------------------------------------------------------------


def test_links_lead_to_files_and_headings(text):
    headings = {
        "#" + re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert len(targets) > 15
    assert [target for target in targets if target not in headings and not (ROOT / target).exists()] == []


def test_modules_that_are_run_exist(text):
    modules = set(re.findall(r"-m\s(reccomp_hf[.\w]*\w)", text))
    assert "reccomp_hf.experiments.selection" in modules
    paths = [ROOT / name.replace(".", "/") for name in modules]
    assert [path for path in paths if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())] == []


@pytest.fixture(scope="module")
def folders(text) -> list[str]:
    """The package's folders in the order of the table."""
    table = text.partition("| `reccomp_hf/` | contents |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)/` \|", table, re.M)


def test_the_table_of_folders_is_complete(folders):
    assert sorted(folders) == sorted(file.parent.name for file in (ROOT / "reccomp_hf").glob("*/__init__.py"))


def test_folders_import_only_from_those_above(folders):
    """As seen by an `import` anywhere in a file, those in functions included."""
    upwards, count = [], 0
    for file in (ROOT / "reccomp_hf").glob("*/**/*.py"):
        package = ("reccomp_hf", *file.relative_to(ROOT / "reccomp_hf").parts[:-1])
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
            for name in node.names:
                target = (*base, name.name)[1]
                count += target in folders
                if target in folders and folders.index(target) > folders.index(package[1]):
                    upwards.append(f"{file.relative_to(ROOT)}:{node.lineno} imports {target}")
    assert upwards == [] and count > 500


def test_the_steps_to_add_a_method_name_what_exists(text):
    steps = text.partition("To add a method:")[2].partition("\n## ")[0]
    named = re.findall(r"`(_?[A-Z_]+)` in `([\w/]+\.py)`", " ".join(steps.split()))
    assert len(named) == 4
    for name, path in named:
        file = ROOT / path if path.startswith("tests/") else ROOT / "reccomp_hf" / path
        assert re.search(rf"^{name}\b", file.read_text(encoding="utf-8"), re.M), (name, path)
