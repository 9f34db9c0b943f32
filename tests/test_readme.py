"""The README's code runs, and the files, commands and modules that it names exist."""

import ast
import re
import shlex
from typing import Any

import pytest
import torch
from architectures import LLAVA_NEXT
from oracle_layout import packed_oracle
from paths import GUIDES, README, ROOT
from second_device import run_elsewhere

from reccomp_hf import TokenRecoveryConfig
from reccomp_hf.cli import main as cli
from reccomp_hf.core.layout import NEWLINE
from reccomp_hf.core.methods import registry
from reccomp_hf.core.methods.registry import get_method, method_names
from reccomp_hf.measure.evaluation.settings import parse_settings


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def guides() -> dict[str, str]:
    """The texts by their paths from the root."""
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in GUIDES}


@pytest.fixture(scope="module")
def everything(guides) -> str:
    return "\n".join(guides.values())


@pytest.fixture
def own_method(guides, monkeypatch, capsys):
    """The guide's method, registered for the test, and the names of its block."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (block,) = re.findall(r"```python\n(.*?)```", guides["reccomp_hf/core/methods/README.md"], flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
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


def test_the_commands_about_many_questions_are_understood(guides):
    text = guides["reccomp_hf/engines/predict/README.md"]
    commands = re.findall(r"^(?:reccomp-hf|accelerate .* -m reccomp_hf) (predict .*)$", text, flags=re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert cli._parser().parse_args(shlex.split(command)).output.endswith(".jsonl")


def test_every_method_has_a_row(guides):
    rows = re.findall(r"^\| (`\"[^|]*) \|", guides["reccomp_hf/core/methods/README.md"], flags=re.MULTILINE)
    assert sorted(re.findall(r'`"(\w+)"`', " ".join(rows))) == sorted(set(method_names()) - {"recoverable"})


def test_the_readme_is_short(text):
    assert len(text.splitlines()) <= 220


def test_the_first_forty_lines_hold_what_a_newcomer_needs(text):
    top = "\n".join(text.splitlines()[:42])
    for needed in (
        "pip install . && reccomp-hf demo",
        'pip install -e ".[test]" && pytest',
        "from_pretrained",
        "What was and was not run",
        "![",
    ):
        assert needed in top


def test_the_commands_are_understood(everything):
    text = everything
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


def test_the_command_of_the_tables_covers_its_rows(guides):
    text = guides["reccomp_hf/measure/evaluation/README.md"]
    (command,) = re.findall(r"^reccomp-hf (eval .*)$", text, flags=re.M)
    assert len(parse_settings(cli._parser().parse_args(shlex.split(command)).settings)) > 5


def test_the_stock_counts_of_llava_next_are_true(guides):
    text = guides["reccomp_hf/core/README.md"]
    row = r"^\| (\d+) x (\d+) \| 1 \+ (\d) \| ([\d,]+) \+ (\d+) = ([\d,]+) \|"
    rows = re.findall(row, text, flags=re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        width, height, tiles, patches, newlines, total = (int(cell.replace(",", "")) for cell in row)
        order, _, count = packed_oracle((height, width))
        assert (len(order), count) == (total, tiles + 1)
        assert (sum(slot != NEWLINE for slot in order), order.count(NEWLINE)) == (patches, newlines)


# ---- paths and names -----------------------------------------------------------------------------------------------


def headings(text):
    lines = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", GUIDES)
def test_links_lead_to_files_and_headings(path, guides):
    text, wrong = guides[path], []
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert path != "README.md" or len(targets) > 15
    for target in targets:
        name, _, heading = target.partition("#")
        file = (ROOT / path).parent / name if name else ROOT / path
        if not file.exists() or (heading and heading not in headings(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    assert wrong == []


def test_every_guide_is_linked_from_the_readme(text):
    assert [path for path in GUIDES if path not in text and path != "README.md"] == []


def test_modules_that_are_run_exist(everything):
    modules = set(re.findall(r"-m\s(reccomp_hf[.\w]*\w)", everything))
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


def test_the_steps_to_add_a_method_name_what_exists(guides):
    steps = guides["reccomp_hf/core/methods/README.md"].partition("## Adding a built-in method")[2]
    named = re.findall(r"`(_?[A-Z_]+)` in `([\w/]+\.py)`", " ".join(steps.split()))
    assert len(named) == 4
    for name, path in named:
        file = ROOT / path if path.startswith("tests/") else ROOT / "reccomp_hf" / path
        assert re.search(rf"^{name}\b", file.read_text(encoding="utf-8"), re.M), (name, path)
