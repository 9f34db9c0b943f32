"""A name becomes a folder: what is downloaded, what the cache saves, and what each failure says."""

import contextlib
import shutil
import time

import hub_client
import pytest
from huggingface_hub import constants
from saved import save_checkpoint

from reccomp_hf.checkpoints import info as inspection
from reccomp_hf.checkpoints.hub import push, resolve, split_revision
from reccomp_hf.cli import main as cli

SHARD = "model-00001-of-00006.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint in shards, with files that nobody needs: not to be changed."""
    folder = save_checkpoint(tmp_path_factory.mktemp("published") / "model", shard="100KB")
    for name in ("pytorch_model.bin", "tf_model.h5", "consolidated.safetensors", "figure.png", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 1000)
    (folder / "README.md").write_text("A card.")
    return folder


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetched(hub):
    """The files whose content was asked for."""
    return {entry[1].split("/resolve/")[1].partition("/")[2] for entry in hub.requests("GET", "/resolve/")}


# ---- what is downloaded --------------------------------------------------------------------------------------------


def test_a_folder_is_itself(hub, tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert hub.log == []


def test_safetensors_and_descriptions_and_nothing_else(hub, published):
    hub.make("org/model", published)
    folder = resolve("org/model")
    useless = {"pytorch_model.bin", "tf_model.h5", "consolidated.safetensors", "figure.png", "onnx/model.onnx"}
    code = {name for name in names(published) if name.endswith(".py")}
    assert code and names(folder) == names(published) - useless - code
    assert {SHARD, "README.md", "chat_template.jinja", "recovery_tokenizer/tokenizer.json"} <= names(folder)
    assert (folder / SHARD).read_bytes() == (published / SHARD).read_bytes()


def test_without_weights(hub, published, capsys):
    hub.make("org/model", published)
    folder = resolve("org/model", weights=False)
    assert not [name for name in fetched(hub) if name.endswith((".safetensors", ".bin"))]
    assert inspection.folder_of("org/model") == folder
    assert cli.main(["info", "org/model"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("org/model\n") and "unknown: no safetensors files here" in out
    assert inspection.describe(folder, "org/model")["files"]["recovery_tokenizer"]


def test_pytorch_files_where_there_is_nothing_else(hub, published, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(published / "config.json", folder)
    for name in ("pytorch_model.bin", "tf_model.h5"):
        (folder / name).write_bytes(b"weights")
    hub.make("org/old", folder)
    assert names(resolve("org/old")) == {"config.json", "pytorch_model.bin"}


def test_revisions(hub, published):
    repo = hub.make("org/model", published)
    first = repo.branches["main"]
    repo.branches["old/one"] = first
    tree = dict(repo.at("main").tree)
    repo.commit("main", "another card", {**tree, "README.md": tree["config.json"]})
    cards = {
        name: (resolve(name, weights=False) / "README.md").read_bytes()
        for name in ("org/model", "org/model@main", f"org/model@{first}", "org/model@old/one")
    }
    new, old = (published / "config.json").read_bytes(), b"A card."
    assert list(cards.values()) == [new, new, old, old]
    assert split_revision("org/model@old/one") == ("org/model", "old/one")
    assert split_revision("org/model") == ("org/model", None)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars(hub, published, capsys, progress):
    hub.make("org/model", published)
    resolve("org/model", weights=False, progress=progress)
    assert ("Fetching" in capsys.readouterr().err) == progress
    resolve("org/model")
    assert "Fetching" in capsys.readouterr().err  # as it was


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_offline_the_cache_answers(hub, published, monkeypatch):
    hub.make("org/model", published)
    online = resolve("org/model")
    hub.log.clear()
    with hub_client.offline(monkeypatch):
        assert resolve("org/model") == online
    assert hub.log == []


def test_offline_without_what_is_needed(hub, published, monkeypatch):
    hub.make("org/model", published)
    pattern = "org/model is not a folder, and HF_HUB_OFFLINE is set and it is not in the cache"
    with hub_client.offline(monkeypatch), pytest.raises(OSError, match=pattern):
        resolve("org/model")
    folder = resolve("org/model", weights=False)
    with hub_client.offline(monkeypatch):
        assert resolve("org/model", weights=False) == folder
        with pytest.raises(OSError, match=r"org/model .*the cache.*HF_HUB_OFFLINE|HF_HUB_OFFLINE.*the cache"):
            resolve("org/model")


def test_what_is_complete_is_not_downloaded_again(hub, published):
    hub.make("org/model", published)
    resolve("org/model")
    hub.log.clear()
    resolve("org/model")
    assert not fetched(hub)


@pytest.fixture
def small_pieces(monkeypatch):
    """The client writes what it receives in pieces of 10 MB, and loses a piece that it has not whole."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_download_is_taken_up(hub, published, tmp_path):
    hub.make("org/model", published)
    hub.break_next("GET", SHARD, cut=30_000)
    hub.break_next("GET", SHARD, cut=0, times=99)
    pattern = r"org/model is not a folder, and the download was interrupted \(.*Run it again: complete files are in"
    with pytest.raises(OSError, match=pattern) as failure:
        resolve("org/model")
    assert "\n" not in str(failure.value)
    [snapshot] = (tmp_path / "hf-home" / "hub" / "models--org--model" / "snapshots").iterdir()
    complete = names(snapshot)
    assert "config.json" in complete and SHARD not in complete
    hub.faults.clear()
    first, hub.log = hub.log, []
    assert resolve("org/model") == snapshot
    assert (snapshot / SHARD).read_bytes() == (published / SHARD).read_bytes()
    assert SHARD in fetched(hub) and not fetched(hub) & complete
    # 0.36 keeps the piece for the next attempt; 2.x takes it up while it still tries, and starts over afterwards.
    ranges = [entry[3] for entry in first + hub.log if entry[0] == "GET" and SHARD in entry[1]]
    assert "bytes=30000-" in ranges


@pytest.mark.usefixtures("small_pieces")
def test_a_short_interruption(hub, published):
    hub.make("org/model", published)
    hub.break_next("GET", SHARD, cut=2000)
    for _ in range(2):  # 0.36 leaves the second attempt to us
        with contextlib.suppress(OSError):
            folder = resolve("org/model")
            break
    assert (folder / SHARD).read_bytes() == (published / SHARD).read_bytes()
    assert [entry[3] for entry in hub.requests("GET", SHARD)] == [None, "bytes=2000-"]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/nowhere", "/nowhere", "a/b/c", "a\\b"])
def test_a_path_to_nothing_is_not_asked_for(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve(name)
    assert hub.log == []


def test_a_file_is_not_a_folder(hub, published):
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; name the folder"):
        resolve(published / "config.json")


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/none", "hf_me", "the Hub has no such repository"),
        ("org/none", None, r"the Hub requires a login \(401.*`hf auth login`.*HF_TOKEN"),
        ("org/gated", "hf_stranger", "repository is gated: accept its terms on http.*`hf auth login`"),
        ("org/gated", None, "repository is gated: accept its terms"),
        ("org/private", "hf_stranger", "the Hub has no such repository, or it is private"),
        ("org/private", None, "the Hub requires a login"),
        ("org/open", "hf_expired", "the Hub requires a login .*invalid token"),
        ("org/open@v9", "hf_me", "has no such revision"),
        ("org/op en", "hf_me", "not a valid name of a repository"),
        ("org/empty", "hf_me", "checkpoint: it has no config.json"),
    ],
)
def test_what_the_hub_does_not_give(hub, published, monkeypatch, name, token, message):
    hub.make("org/gated", published, gated=True)
    hub.make("org/private", published, private=True)
    hub.make("org/open", published)
    hub.make("org/empty")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=f"^{name} is not a .*{message}") as failure:
        resolve(name)
    assert "\n" not in str(failure.value)


def test_terms_that_were_accepted(hub, published, monkeypatch):
    hub.make("org/gated", published, gated=True, readers={"stranger"})
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert SHARD in names(resolve("org/gated"))


def test_weights_that_are_not_there(hub, published):
    repo = hub.make("org/model", published)
    tree = dict(repo.at("main").tree)
    del tree[SHARD]
    repo.commit("main", "one is gone", tree)
    with pytest.raises(OSError, match=f"org/model lacks 1 of its weight files, {SHARD} among them"):
        resolve("org/model")
    tree = {name: blob for name, blob in tree.items() if "model-" not in name and "pytorch" not in name}
    del tree["model.safetensors.index.json"]
    repo.commit("main", "all are gone", tree)
    with pytest.raises(OSError, match="org/model has no weights: neither"):
        resolve("org/model")


def test_a_hub_that_is_down(hub, published):
    hub.make("org/model", published)
    hub.break_next("GET", "/api/models", status=503, times=99)
    with pytest.raises(OSError, match=r"the Hub answered 503.*Run it again"):
        resolve("org/model")


def test_a_hub_that_nobody_reaches(hub, published):
    hub.server.shutdown()
    hub.server.server_close()
    hub_client.forget_connections()
    began = time.monotonic()
    with pytest.raises(OSError, match=r"the Hub at http.*cannot be reached \(.*and it is not in the cache"):
        resolve("org/model")
    assert time.monotonic() - began < 20
    with pytest.raises(OSError, match=r"Nothing was sent to me/model: the Hub at http.* cannot be reached"):
        push(published, "me/model")
