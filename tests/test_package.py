"""`import reccomp_hf`: names that come when they are used, and model types that transformers knows at once."""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import reccomp_hf

NAMES = [name for name in reccomp_hf.__all__ if name != "AutoModelForVision2Seq"]
SOURCE = """
import json, pickle, sys
sys.path.insert(0, sys.argv[1])
import reccomp_hf
facts = {"rooms": sorted({name.split(".")[1] for name in sys.modules if name.startswith("reccomp_hf.")})}
facts["peft"] = "peft" in sys.modules
reccomp_hf.plot_recovery
facts["matplotlib"] = "matplotlib" in sys.modules
from transformers import AutoModelForImageTextToText, AutoProcessor
from reccomp_hf.demo import checkpoint_folder
loaded = [auto.from_pretrained(checkpoint_folder("demo")) for auto in (AutoModelForImageTextToText, AutoProcessor)]
facts["loaded"] = [type(one).__name__ for one in loaded]
pickled = pickle.load(open(sys.argv[2], "rb"))
facts["same"] = [name for name in pickled if pickled[name] is getattr(reccomp_hf, name)]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh process finds."""
    names = tmp_path_factory.mktemp("names") / "names"
    names.write_bytes(pickle.dumps({name: getattr(reccomp_hf, name) for name in NAMES}))
    command = [sys.executable, "-c", SOURCE, str(Path(reccomp_hf.__file__).parents[1]), str(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_import_loads_core_alone(fresh):
    assert (fresh["rooms"], fresh["peft"], fresh["matplotlib"]) == (["core"], False, False)


def test_the_auto_classes_know_our_models_after_the_import(fresh):
    assert fresh["loaded"] == ["LlavaRecCompForConditionalGeneration", "LlavaRecCompProcessor"]


def test_public_names_can_be_pickled(fresh):
    assert fresh["same"] == NAMES


def test_every_public_name_is_there():
    names = {}
    exec("from reccomp_hf import *", names)
    for name in reccomp_hf.__all__:
        assert names[name] is getattr(reccomp_hf, name), name
        assert name in dir(reccomp_hf)
    assert "__version__" in dir(reccomp_hf)
    with pytest.raises(AttributeError, match="module 'reccomp_hf' has no attribute 'no_such_name'"):
        reccomp_hf.no_such_name  # noqa: B018


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse(Path(reccomp_hf.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == reccomp_hf._MODULE_OF
    assert sorted([*seen, "AutoModelForVision2Seq", "register"]) == sorted(reccomp_hf.__all__)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "is_command_line"),
    [
        (["/env/bin/reccomp-hf", "demo"], ["/env/bin/python", "/env/bin/reccomp-hf", "demo"], True),
        (["C:\\env\\reccomp-hf"], ["python.exe", "/env/reccomp-hf.exe"], True),
        (["-m", "demo"], ["python", "-m", "reccomp_hf", "demo"], True),
        (["-m"], ["python", "-W", "error", "-m", "reccomp_hf"], True),
        (["-m", "predict"], ["python", "-u", "-mreccomp_hf", "predict"], True),
        (["-m"], ["python", "-m", "reccomp_hf.experiments.precision"], False),
        (["-m", "reccomp_hf"], ["python", "-m", "pytest", "reccomp_hf"], False),
        (["-c"], ["python", "-c", "import reccomp_hf"], False),
        (["-c", "reccomp_hf"], ["python", "-c", "import reccomp_hf", "reccomp_hf"], False),
        (["train.py", "reccomp-hf"], ["python", "train.py", "reccomp-hf"], False),
        (["reccomp-hf.py"], ["python", "reccomp-hf.py"], False),
        ([""], ["python"], False),
        ([], ["embedder"], False),
        # A process that multiprocessing spawned has its parent's arguments.
        (["/env/bin/reccomp-hf", "demo"], ["python", "-c", "from multiprocessing.spawn import spawn_main"], False),
    ],
)
def test_only_the_command_line_itself_registers_later(monkeypatch, argv, orig_argv, is_command_line):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert reccomp_hf._is_command_line() is is_command_line
