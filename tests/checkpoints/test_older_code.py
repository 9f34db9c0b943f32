"""Checkpoints with the code of an older layout: they load, a push replaces their code, and other files stay.

That they load without the package is tested in core/test_remote_code.py.
"""

import shutil
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, LLAVA, each_architecture
from paths import DATA
from safetensors.torch import load_file
from saved import OLDER, fixture_values, older_checkpoint, save_checkpoint

from reccomp_hf.checkpoints import hub as package_hub
from reccomp_hf.cli import main as cli
from reccomp_hf.core import remote_code

# huggingface_hub 2.x uploads by `data=` where there is no Xet storage, which its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

NEW = remote_code.flat_sources()
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An older folder of each architecture, not to be changed."""
    root = tmp_path_factory.mktemp("older")
    return {row.name: older_checkpoint(row, root / row.name) for row in ARCHITECTURES}


@pytest.fixture
def older(folders, tmp_path):
    """A copy that may be changed, with a Python file of its owner's."""
    folder = shutil.copytree(folders["llava"], tmp_path / "older")
    (folder / "README.md").write_text(CARD)
    (folder / "notes.py").write_text("import checks\n")
    return folder


def code_of(folder):
    return {path.name for path in folder.glob("*.py")}


@each_architecture
def test_the_fixture_is_of_the_older_layout(architecture, folders):
    folder = folders[architecture.name]
    names = code_of(folder)
    assert {path.name for path in remote_code.code_files(folder)} == names
    assert {"checks.py", "vision.py", "methods_trim.py", "recovery.py", "configuration_reccomp.py"} < names
    assert len(names) == 29 and len(names - NEW.keys()) > 20


@each_architecture
def test_the_package_loads_it(architecture, folders):
    expected = load_file(DATA / OLDER[architecture.name] / architecture.name / "expected.safetensors")
    values = fixture_values(folders[architecture.name])
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_an_older_folder_that_is_pushed_gets_the_new_code(hub, older):
    pushed = package_hub.push(older, "me/model")
    files = hub.repos["me/model"].files()
    assert {name: files[name].decode() for name in NEW} == NEW
    assert code_of(older) == NEW.keys() | {"notes.py"}
    assert {name for name in files if name.endswith(".py")} == set(NEW)  # code of the user's stays at home
    assert pushed.removed == []
    assert not package_hub.push(older, "me/model").changed


def test_a_push_removes_the_code_of_an_older_layout_in_the_same_commit(hub, older, tmp_path):
    repo, stale = hub.make("me/model", older), code_of(older) - NEW.keys() - {"notes.py"}
    before, first = len(repo.history()), repo.branches["main"]
    folder = save_checkpoint(tmp_path / "new")
    pushed = package_hub.push(folder, "me/model")
    assert set(pushed.removed) == stale and "checks.py" in stale
    assert len(repo.history()) == before + 1 == len(hub.requests("POST", "/commit/")) + before
    files = repo.files()
    assert {name for name in files if name.endswith(".py")} == NEW.keys() | {"notes.py"}
    assert files["notes.py"] == b"import checks\n" and files[".gitattributes"]
    assert repo.files(first)["checks.py"] == (older / "checks.py").read_bytes()
    assert package_hub.push(folder, "me/model").removed == []


def test_the_command_says_how_many_files_it_removed(hub, older, tmp_path, capsys):
    stale = code_of(older) - NEW.keys() - {"notes.py"}
    hub.make("me/model", older)
    assert cli.main(["push", str(save_checkpoint(tmp_path / "new")), "me/model"]) == 0
    assert f"in one commit, {len(stale)} code files of an older layout removed.\n" in capsys.readouterr().out


def test_code_is_removed_from_the_branch_of_the_push_alone(hub, older, tmp_path):
    repo = hub.make("me/model", older)
    pushed = package_hub.push(save_checkpoint(tmp_path / "new"), "me/model", revision="next")
    assert "checks.py" in pushed.removed
    assert "checks.py" in repo.files("main") and "checks.py" not in repo.files("next")


def test_transformers_own_push_leaves_the_old_code(hub, older):
    """It only adds files, and the new entry files no longer lead to the old ones."""
    repo = hub.make("me/model", older)
    LLAVA.compressed().push_to_hub("me/model")
    assert {"checks.py", "choosing_reccomp.py"} < repo.files().keys()
    stale = set(repo.files()) - NEW.keys()
    assert {name for name in stale if name.endswith(".py")} == code_of(older) - NEW.keys()
    assert package_hub.push(save_checkpoint(older.with_name("new")), "me/model").removed == []


def test_files_of_the_same_names_that_no_entry_file_imports_stay(hub, older, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("checks.py", "vision.py", "methods_trim.py"):
        shutil.copy(older / name, theirs)
    repo = hub.make("me/model", theirs)
    assert package_hub.push(save_checkpoint(tmp_path / "new"), "me/model").removed == []
    assert {"checks.py", "vision.py", "methods_trim.py"} < repo.files().keys()


def test_a_hub_that_does_not_give_the_old_code_is_an_error(hub, older, tmp_path):
    repo = hub.make("me/model", older)
    before = dict(repo.branches)
    hub.break_next("GET", "/checks.py", status=403, times=99)
    hub.break_next("HEAD", "/checks.py", status=403, times=99)
    with pytest.raises(OSError, match="Nothing was sent to me/model: "):
        package_hub.push(save_checkpoint(tmp_path / "new"), "me/model")
    assert repo.branches == before


@each_architecture
def test_saving_over_it_replaces_its_code(architecture, folders, tmp_path):
    folder = shutil.copytree(folders[architecture.name], tmp_path / "model")
    architecture.model_class.from_pretrained(folder).save_pretrained(folder)
    assert code_of(folder) == NEW.keys()
    assert Path(folder, "processor_config.json").is_file()
