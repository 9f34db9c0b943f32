"""A checkpoint folder becomes one commit of a repository, by the real client on a Hub of our own."""

import json
import shutil

import pytest
from architectures import each_architecture
from safetensors.torch import load_file, save_file
from saved import save_checkpoint

from reccomp_hf.checkpoints import cards, completeness
from reccomp_hf.checkpoints import hub as package_hub
from reccomp_hf.cli import main as cli
from reccomp_hf.core import remote_code

# huggingface_hub 2.x uploads by `data=` where there is no Xet storage, which its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A whole checkpoint in one file, and one in shards, each with a card: not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    for name, shard in (("whole", "5GB"), ("shards", "100KB")):
        save_checkpoint(folder / name, shard=shard)
        remote_code.write_remote_code(folder / name)
        (folder / name / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(published / "whole", tmp_path / "model")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in completeness.files_of(folder)}


# ---- what is sent --------------------------------------------------------------------------------------------------


@each_architecture
def test_a_push_is_one_commit_with_everything(hub, tmp_path, architecture):
    folder = save_checkpoint(tmp_path / "model", architecture, shard="100KB")
    for name in (".env", "__pycache__/a.pyc", "recovery_tokenizer/.lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "README.md").write_text(CARD)
    pushed = package_hub.push(folder, "me/model", message="First words")
    repo = hub.repos["me/model"]
    assert (pushed.url, pushed.removed) == (f"{hub.url}/me/model", [])
    assert [commit.title for commit in repo.history()] == ["First words", "initial commit"]
    assert len(hub.requests("POST", "/commit/")) == 1
    assert repo.branches.keys() == {"main"} and not repo.private
    sent = repo.files()
    del sent[".gitattributes"]
    assert sent == contents(folder)
    shards = {name for name in sent if name.endswith(".safetensors")}
    modules = {f"modeling_{architecture.config_class.model_type}.py", "configuration_reccomp.py"}
    tokenizers = {"tokenizer.json", "recovery_tokenizer/tokenizer.json", "processor_config.json"}
    assert len(shards) > 2
    assert {"README.md", "config.json", "processing_reccomp.py", *modules, *tokenizers, *shards} <= sent.keys()
    assert {name for name in sent if repo.at("main").tree[name].large} == shards


def test_large_files_go_in_parts_if_the_hub_wants_that(hub, published):
    hub.part_size = 40_000
    package_hub.push(published / "shards", "me/model")
    assert len(hub.requests("PUT", "/part/")) > 8
    assert contents(published / "shards").items() <= hub.repos["me/model"].files().items()


def test_what_has_not_changed_makes_no_new_commit(hub, folder):
    first = package_hub.push(folder, "me/model")
    again = package_hub.push(folder, "me/model")
    assert (first.changed, again.changed) == (True, False)
    assert first.commit == again.commit == hub.repos["me/model"].branches["main"]
    (folder / "README.md").write_text(CARD + "More.\n")
    assert package_hub.push(folder, "me/model").changed
    assert len(hub.repos["me/model"].history()) == 3
    assert len(hub.requests("PUT", "/storage/")) == 1


def test_code_is_written_if_a_file_is_missing_and_only_then(hub, folder):
    edited = (folder / "choosing_reccomp.py").read_bytes() + b"\n# changed by its owner\n"
    (folder / "choosing_reccomp.py").write_bytes(edited)
    package_hub.push(folder, "me/model")
    assert hub.repos["me/model"].files()["choosing_reccomp.py"] == edited
    (folder / "relevance_reccomp.py").unlink()
    package_hub.push(folder, "me/other")
    files, sources = hub.repos["me/other"].files(), remote_code.flat_sources()
    assert {name: files[name].decode() for name in sources} == sources


def test_a_card_is_written_where_there_is_none_of_a_person(hub, tmp_path):
    folder = save_checkpoint(tmp_path / "model", budget=24)
    cards.write_card(folder, license="mit")
    for repo in ("me/model", "org/model"):  # the second time it is one of ours that names another place
        package_hub.push(folder, repo)
        card = hub.repos[repo].files()["README.md"].decode()
        assert f'from_pretrained("{repo}"' in card and "license: mit" in card
    edited = card.replace("# ", "# My ", 1)
    for text in (edited, CARD):
        (folder / "README.md").write_text(text)
        package_hub.push(folder, "me/third")
        assert hub.repos["me/third"].files()["README.md"].decode() == text
    (folder / "README.md").unlink()
    package_hub.push(folder, "fourth")
    assert "license: other" in hub.repos["me/fourth"].files()["README.md"].decode()


def test_what_a_repository_holds_stays(hub, folder):
    other = hub.make("me/model")
    tree = other.at("main").tree
    other.commit("main", "mine", {**tree, "notes.txt": tree[".gitattributes"]})
    package_hub.push(folder, "me/model")
    assert {"notes.txt", ".gitattributes", *contents(folder)} == other.files().keys()
    assert len(other.history()) == 3


def test_shards_beside_a_whole_file_would_not_be_loaded(hub, published):
    package_hub.push(published / "whole", "me/model")
    before = dict(hub.repos["me/model"].branches)
    with pytest.raises(ValueError, match=r"me/model@main holds a model.safetensors, .*instead.*Nothing was sent"):
        package_hub.push(published / "shards", "me/model")
    assert hub.repos["me/model"].branches == before
    package_hub.push(published / "shards", "me/sharded")
    package_hub.push(published / "whole", "me/sharded")


# ---- where to ------------------------------------------------------------------------------------------------------


def test_private(hub, folder):
    package_hub.push(folder, "me/secret", private=True)
    package_hub.push(folder, "me/secret", private=True)
    package_hub.push(folder, "org/open", private=False)
    assert hub.repos["me/secret"].private and not hub.repos["org/open"].private
    before = len(hub.repos["org/open"].commits)
    with pytest.raises(ValueError, match="org/open exists and is public"):
        package_hub.push(folder, "org/open", private=True)
    assert len(hub.repos["org/open"].commits) == before


def test_a_branch_of_its_own(hub, folder):
    pushed = package_hub.push(folder, "me/model", revision="budget-64")
    repo = hub.repos["me/model"]
    assert pushed.url == f"{hub.url}/me/model/tree/budget-64"
    assert repo.files("main").keys() == {".gitattributes"}
    assert "config.json" in repo.files("budget-64") and pushed.commit == repo.branches["budget-64"]
    (folder / "README.md").write_text(CARD + "More.\n")
    package_hub.push(folder, "me/model", revision="budget-64")
    assert len(repo.history("budget-64")) == 3
    assert len(hub.requests("POST", "/branch/budget-64")) == 1


def test_an_owner_need_not_be_named(hub, folder):
    assert package_hub.push(folder, "model").repo == "me/model"


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("stranger/model", "hf_me", "your token may not write there"),
        ("me/model", None, "the Hub requires a login .*`hf auth login`.*HF_TOKEN"),
        ("me/model", "hf_old", "the Hub requires a login .*invalid token"),
        ("me/a/model", "hf_me", "not a valid name of a repository"),
        ("datasets/me/model", "hf_me", "not a valid name of a repository"),
        ("me/mo del", "hf_me", "not a valid name of a repository"),
    ],
)
def test_who_may_not_push(hub, published, monkeypatch, repo, token, message):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=f"Nothing was sent to {repo}: .*{message}"):
        package_hub.push(published / "whole", repo)
    assert not hub.repos and not hub.requests("PUT", "")


def test_a_public_repository_of_somebody_else(hub, published):
    hub.make("stranger/model")
    with pytest.raises(OSError, match="your token may not write there"):
        package_hub.push(published / "whole", "stranger/model")
    assert len(hub.repos["stranger/model"].history()) == 1


# ---- what is refused before anything is sent -----------------------------------------------------------------------


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_weight(path):
    weights = load_file(path)
    weights.pop(min(weights))
    save_file(weights, path, metadata={"format": "pt"})


def stock(path):
    path.write_text(json.dumps({"model_type": "llava"}))


def impossible_budget(path):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "token_recovery": {**fields["token_recovery"], "budget": -3}}))


def remove(path):
    path.unlink()


SHARD = "model-00002-of-*.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", remove, "it has no config.json"),
        ("config.json", cut_in_half, "config.json is not valid JSON"),
        ("config.json", stock, "model_type is 'llava'.*reccomp-hf convert"),
        ("config.json", impossible_budget, "token_recovery.budget must be"),
        ("model.safetensors.index.json", remove, "has no weights"),
        ("model.safetensors.index.json", cut_in_half, "is not valid JSON"),
        (SHARD, remove, "lacks 1 of its weight files, model-00002"),
        (SHARD, cut_in_half, "model-00002.*cannot be read.*truncated"),
        (SHARD, without_a_weight, "model-00002.*lacks weights that the index puts there"),
        ("tokenizer_config.json", remove, "has no tokenizer_config.json: save the processor"),
        ("processor_config.json", remove, "has no processor_config.json: save the processor"),
        ("recovery_tokenizer/tokenizer_config.json", remove, "has no recovery_tokenizer/tokenizer_config.json"),
        ("tokenizer.json", cut_in_half, r"tokenizer\.json is not valid JSON"),
    ],
)
def test_what_nobody_could_load_is_not_sent(hub, published, tmp_path, name, change, message):
    folder = shutil.copytree(published / "shards", tmp_path / "model")
    [path] = folder.glob(name)
    change(path)
    with pytest.raises(ValueError, match=message):
        package_hub.push(folder, "me/model")
    assert hub.log == []


def test_a_folder_that_is_not_there(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        package_hub.push(tmp_path / "nowhere", "me/model")


def test_a_card_that_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(OSError, match=r"Invalid metadata in README.md.*Branch 'main' is unchanged"):
        package_hub.push(folder, "me/model")
    assert hub.repos["me/model"].files().keys() == {".gitattributes"}


# ---- what goes wrong on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "piece", "fault", "message"),
    [
        ("PUT", "/storage/", {"cut": 20_000, "times": 99}, "the upload was interrupted"),
        ("PUT", "/storage/", {"status": 503, "times": 99}, "the Hub answered 503"),
        ("PUT", "/storage/", {"corrupt": True, "times": 99}, "the Hub answered 400.*announced sha256"),
        ("POST", "/batch", {"status": 500, "times": 99}, "the Hub answered 500"),
        ("POST", "/commit/", {"cut": 200}, "the upload was interrupted"),
        ("POST", "/commit/", {"status": 500}, "the Hub answered 500"),
        ("POST", "/commit/", {"status": 503}, "the Hub answered 503"),
    ],
)
def test_a_push_that_breaks_off_leaves_the_branch_as_it_was(hub, published, method, piece, fault, message):
    repo = hub.make("me/model")
    before = dict(repo.branches), len(repo.commits)
    hub.break_next(method, piece, **fault)
    pattern = f"The push to me/model failed: .*{message}.*Branch 'main' is unchanged.*`reccomp-hf push .*` tries again"
    with pytest.raises(OSError, match=pattern) as failure:
        package_hub.push(published / "shards", "me/model")
    assert "\n" not in str(failure.value)
    assert (dict(repo.branches), len(repo.commits)) == before
    hub.faults.clear()
    hub.log.clear()
    assert package_hub.push(published / "shards", "me/model").changed
    assert contents(published / "shards").items() <= repo.files().items()
    if piece == "/commit/":
        assert not hub.requests("PUT", "")  # the storage has them


def test_a_short_failure_is_the_clients_affair(hub, folder):
    hub.break_next("PUT", "/storage/", status=503, times=2)
    assert package_hub.push(folder, "me/model").changed
    assert [entry[2] for entry in hub.requests("PUT", "/storage/")] == [503, 503, 200]


def test_a_commit_whose_answer_is_lost(hub, folder):
    hub.break_next("POST", "/commit/", silent=True)
    with pytest.raises(OSError, match=r"Yet branch 'main' has a new commit, [0-9a-f]{40}: check it"):
        package_hub.push(folder, "me/model")
    assert not package_hub.push(folder, "me/model").changed


def test_a_hub_that_goes_away(hub, folder):
    hub.break_next("POST", "/commit/", cut=100)
    hub.break_next("GET", "/revision/main", status=500, times=99, skip=1)
    with pytest.raises(OSError, match=r"Whether branch 'main' has the commit is not known"):
        package_hub.push(folder, "me/model")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(hub, folder, capsys):
    assert cli.main(["push", str(folder), "me/model", "--private", "--revision", "b", "--message", "Mine"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Pushed {folder}: ") and " files in one commit.\n" in out
    assert f"{hub.url}/me/model/tree/b" in out and out.endswith("Next: reccomp-hf info me/model@b\n")
    assert err == ""
    repo = hub.repos["me/model"]
    assert repo.private and repo.history("b")[0].title == "Mine"
    assert cli.main(["info", "me/model@b"]) == 0
    assert capsys.readouterr().out.startswith("me/model@b\n")
    assert cli.main(["push", str(folder), "me/model", "--revision", "b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "repo": "me/model",
        "branch": "b",
        "commit": repo.branches["b"],
        "url": f"{hub.url}/me/model/tree/b",
        "files": len(contents(folder)),
        "changed": False,
        "removed": [],
    }


def test_errors_of_the_command_are_one_line(hub, folder, capsys):
    assert cli.main(["push", str(folder), "stranger/model"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("reccomp-hf: error: Nothing was sent to stranger/model: your token may not write there")


def test_what_a_training_run_left_stays_at_home(published, tmp_path):
    folder = shutil.copytree(published / "whole", tmp_path / "model")
    files = completeness.files_of(folder)
    for name in (
        *("optimizer.pt", "training_args.bin", "trainer_state.json", "all_results.json", "runs/events.json"),
        *(
            "credentials.json",
            ".secret.json",
            ".env",
            "train.py",
            ".hidden.py",
            "screen.png",
            "recovery_tokenizer/key.json",
        ),
        *("model-00009-of-00009.safetensors", "id_rsa", "vocab.json.bak", "recovery_tokenizer/key.json"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert completeness.files_of(folder) == files


def test_a_card_is_written_anew_for_a_name_within_another(published, tmp_path):
    folder = shutil.copytree(published / "whole", tmp_path / "model", ignore=shutil.ignore_patterns("README.md"))
    for repo in ("me/model-64", "me/model"):
        completeness.complete_folder(folder, repo)
        assert f'from_pretrained("{repo}"' in (folder / "README.md").read_text(encoding="utf-8")
