"""From two repositories on the Hub to a third in one command, and what a stranger has of it."""

import json
import subprocess
import sys

import hub_client
import pytest
import tiny
import torch
from architectures import LLAVA, prompt_of
from paths import INSTALLED, SUPPORT
from transformers import AutoModelForImageTextToText, AutoProcessor

from reccomp_hf.cli import main as cli

# huggingface_hub 2.x uploads by `data=` where there is no Xet storage, which its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

PROMPT = prompt_of(tiny.SENTENCES[0], 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock LLaVA whose card names a licence, and its CLIP."""
    stock, clip = LLAVA.save_sources(tmp_path_factory.mktemp("sources"))
    (stock / "README.md").write_text("---\nlicense: llama2\n---\n# LLaVA\n")
    return stock, clip


@pytest.fixture
def sources(hub, folders):
    """`ORG/llava@REV` and `ORG/clip`; the LLaVA's main branch has moved on and cannot be converted."""
    repo, _ = hub.make("org/llava", folders[0]), hub.make("org/clip", folders[1])
    revision = repo.branches["main"]
    repo.commit("main", "broken", {"config.json": repo.at("main").tree["README.md"]})
    return f"org/llava@{revision}", "org/clip"


def logits_of_a_stranger(hub, home, name):
    """What a process without the package, which knows of the Hub by its environment alone, has of a repository."""
    environment = hub_client.environment(hub.url, home, PYTHONPATH=f"{INSTALLED}:{SUPPORT}")
    result = home.parent / "result.pt"
    command = [sys.executable, SUPPORT / "hub_child.py", name, PROMPT, result]
    done = subprocess.run(command, cwd=home.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(result, weights_only=True)


@torch.no_grad()
def logits_of(name):
    model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
    return model(**processor(images=tiny.pictures(1)[0], text=PROMPT, return_tensors="pt")).logits


def test_one_command_and_a_stranger(hub, sources, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--set", "budget=24", "--push", "me/model", "--private", "--revision", "b24"]
    assert cli.main(["convert", *sources, str(output), *options]) == 0
    said = capsys.readouterr().out
    assert f"{hub.url}/me/model/tree/b24" in said
    repo = hub.repos["me/model"]
    assert repo.private and len(repo.history("b24")) == 2 and len(repo.history("main")) == 1
    files = repo.files("b24")
    for name in ("config.json", "processor_config.json", "modeling_llava_reccomp.py"):
        assert files[name] == (output / name).read_bytes()
    card = files["README.md"].decode()
    assert "license: llama2" in card and "- org/llava\n" in card and 'from_pretrained("me/model"' in card
    assert f"reccomp-hf convert {' '.join(sources)} model" in card.replace(" \\\n   ", "")
    record = json.loads(files["conversion.json"])
    assert (record["llava"], record["clip"], record["fields"]) == (*sources, {"budget": 24})
    assert record["proof"] in " ".join(said.split())
    assert any(name.endswith(".safetensors") for name in files)
    repo.commit("main", "as on the branch", repo.at("b24").tree)
    remote, expected = logits_of_a_stranger(hub, tmp_path / "strangers-home", "me/model"), logits_of(output)
    assert remote["module"].startswith("transformers_modules.")
    assert torch.equal(remote["logits"], expected)
    assert torch.equal(logits_of("me/model"), expected)


def test_a_push_that_fails_leaves_the_folder(hub, sources, tmp_path, capsys):
    output = tmp_path / "out"
    hub.break_next("POST", "/commit/", status=500)
    arguments = ["convert", *sources, str(output), "--set", "budget=24", "--push", "me/model"]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"Wrote {output}")
    [line] = [line for line in err.splitlines() if line.startswith("reccomp-hf: error: ")]
    assert f"`reccomp-hf push {output} me/model` tries again" in line
    assert cli.main(["push", str(output), "me/model"]) == 0
    assert len(hub.repos["me/model"].history()) == 2


@pytest.mark.parametrize(
    ("llava", "message"),
    [
        ("org/gated", "org/gated is not a folder, and its repository is gated: accept its terms"),
        ("org/none", "org/none is not a folder, and the Hub has no such repository"),
        ("org/llava@v9", "org/llava@v9 is not a folder, and the repository on the Hub has no such revision"),
    ],
)
def test_sources_that_cannot_be_downloaded(hub, sources, folders, tmp_path, capsys, monkeypatch, llava, message):
    hub.make("org/gated", folders[0], gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    assert cli.main(["convert", llava, "org/clip", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_downloads_no_weights(hub, sources, tmp_path, capsys):
    assert cli.main(["convert", *sources, str(tmp_path / "out"), "--dry-run", "--push", "me/model"]) == 0
    assert "me/model" in capsys.readouterr().out
    weights = [entry for entry in hub.requests("GET", "/resolve/") if entry[1].endswith(".safetensors")]
    assert {status for _, _, status, _ in weights} <= {206}  # pieces: their headers
    assert not hub.requests("POST", "") and not (tmp_path / "out").exists()
