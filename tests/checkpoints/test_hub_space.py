"""A folder of a Space becomes one commit of a Space, by the real client on a Hub of our own."""

import pytest

from reccomp_hf.checkpoints.hub_space import push_space
from reccomp_hf.cli import main as cli

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

CARD = "---\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n# A page\n"
FILES = {
    "app.py": "print()\n",
    "requirements.txt": "gradio\n",
    "README.md": CARD,
    "reccomp_hf/__init__.py": "",
    "reccomp_hf/old.py": "old = 1\n",
    "reccomp_hf/demo/model.safetensors": "weights",
}


@pytest.fixture
def space(tmp_path):
    for name, text in {**FILES, "reccomp_hf/__pycache__/a.pyc": "x", ".env": "secret"}.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_text(text)
    return tmp_path / "space"


def test_a_space_is_one_commit(hub, space):
    pushed = push_space(space, "me/page", message="First words")
    repo = hub.repos["me/page"]
    assert (repo.sdk, repo.private) == ("gradio", False)
    assert (pushed.url, pushed.changed, pushed.files) == (f"{hub.url}/spaces/me/page", True, len(FILES))
    assert [commit.title for commit in repo.history()] == ["First words", "initial commit"]
    sent = repo.files()
    del sent[".gitattributes"]
    assert {name: data.decode() for name, data in sent.items()} == FILES
    assert not push_space(space, "me/page").changed


def test_a_newer_copy_of_the_package_replaces_the_older_one(hub, space):
    push_space(space, "me/page")
    repo = hub.repos["me/page"]
    tree = repo.at("main").tree
    repo.commit("main", "mine", {**tree, "examples/mine.png": tree[".gitattributes"]})
    (space / "reccomp_hf" / "old.py").unlink()
    pushed = push_space(space, "me/page")
    assert pushed.removed == ["reccomp_hf/old.py"]
    assert "reccomp_hf/old.py" not in repo.files() and "examples/mine.png" in repo.files()


def test_a_branch_and_a_private_space(hub, space):
    pushed = push_space(space, "me/page", private=True, revision="try")
    assert hub.repos["me/page"].private and pushed.url == f"{hub.url}/spaces/me/page/tree/try"
    assert "app.py" not in hub.repos["me/page"].files() and "app.py" in hub.repos["me/page"].files("try")
    push_space(space, "me/open")
    with pytest.raises(ValueError, match="me/open exists and is public"):
        push_space(space, "me/open", private=True)


def test_other_folders_are_refused(hub, space, tmp_path):
    with pytest.raises(ValueError, match="not a folder: `reccomp-hf app MODEL --space"):
        push_space(tmp_path / "missing", "me/page")
    (space / "README.md").write_text("---\nsdk: docker\n---\n")
    with pytest.raises(ValueError, match="must say `sdk: gradio`, got 'docker'"):
        push_space(space, "me/page")
    (space / "app.py").unlink()
    with pytest.raises(ValueError, match=r"it has no app\.py"):
        push_space(space, "me/page")
    assert hub.log == []


def test_failures_are_one_sentence(hub, space):
    with pytest.raises(OSError, match="Nothing was sent to stranger/page: your token may not write there"):
        push_space(space, "stranger/page")
    hub.break_next("POST", "/commit/", status=500, times=9)
    with pytest.raises(OSError, match="The push to me/page failed: the Hub answered 500"):
        push_space(space, "me/page")


def test_the_command(hub, space, capsys):
    assert cli.main(["push", str(space), "me/page", "--space"]) == 0
    out = capsys.readouterr().out
    assert f"Pushed {space}: 6 files in one commit.\n  {hub.url}/spaces/me/page\n" in out
    assert cli.main(["push", str(space), "me/model"]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
