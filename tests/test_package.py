"""`import reccomp_hf`: names that come when they are used, and model types that transformers knows at once."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import reccomp_hf


def child(source):
    """What a fresh process prints."""
    package = str(Path(reccomp_hf.__file__).parents[1])
    source = f"import sys\nsys.path.insert(0, {package!r})\n{source}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_auto_classes_know_our_models_after_the_import():
    source = """
import reccomp_hf
from transformers import AutoModelForImageTextToText, AutoProcessor
from reccomp_hf.demo import checkpoint_folder
folder = checkpoint_folder("demo")
print(type(AutoModelForImageTextToText.from_pretrained(folder)).__name__)
print(type(AutoProcessor.from_pretrained(folder)).__name__)
"""
    assert child(source) == "LlavaRecCompForConditionalGeneration\nLlavaRecCompProcessor\n"


def test_the_import_loads_core_alone():
    source = """
import reccomp_hf
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("reccomp_hf.")}
print(sorted(rooms), "matplotlib" in sys.modules, "peft" in sys.modules)
"""
    assert child(source) == "['core'] False False\n"


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


def test_public_names_can_be_pickled(tmp_path):
    names = [name for name in reccomp_hf.__all__ if name != "AutoModelForVision2Seq"]
    (tmp_path / "names").write_bytes(pickle.dumps({name: getattr(reccomp_hf, name) for name in names}))
    source = f"""
import pickle
found = pickle.load(open({str(tmp_path / "names")!r}, "rb"))
import reccomp_hf
print([name for name in found if found[name] is not getattr(reccomp_hf, name)], len(found))
"""
    assert child(source) == f"[] {len(names)}\n"


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
