"""Checkpoints from the Hugging Face Hub and to it: a name becomes a local folder, a folder becomes one commit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .completeness import check_checkpoint, complete_folder, files_of, missing_shards

DESCRIPTIONS = ["*.json", "*.jinja", "*.model", "*merges.txt", "*vocab.txt", "README.md", "LICENSE*"]
SAFETENSORS = ["model.safetensors", "model-*.safetensors"]
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin"]
NOT_REACHED = "the Hub at {} cannot be reached"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "Run it again: what is complete is in the cache and is not downloaded twice"


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo: The repository's id, with its owner.
        branch: The branch that the commit is on.
        commit: The commit's hash; the branch's old one where nothing had changed.
        url: The address of the repository, or of its branch where one was named.
        files: How many files the checkpoint has.
        changed: Whether there was anything to commit.
    """

    repo: str
    branch: str
    commit: str
    url: str
    files: int
    changed: bool


def split_revision(source: str) -> tuple[str, str | None]:
    """`org/name@revision` as its two parts; the revision is `None` where none is named."""
    name, _, revision = source.partition("@")
    return name, revision or None


def resolve(source: str | os.PathLike[str], *, weights: bool = True, progress: bool = True) -> Path:
    """The folder that a name stands for: itself, or what was downloaded of a repository on the Hub.

    Args:
        source: A folder, a Hub id, or `org/name@revision`, where the revision is a branch, a tag or a commit.
        weights: Download the weights too: safetensors, or PyTorch's own files where a repository has no safetensors.
        progress: Show the Hub client's progress bars.

    Raises:
        FileNotFoundError: The name is written as a path, and nothing is there.
        OSError: The Hub does not have it, does not give it, or cannot be reached; or the download broke off.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is no folder: it is a file.")
    repo, revision = split_revision(name)
    if _looks_like_a_path(repo):
        raise FileNotFoundError(f"{name} is no folder: there is nothing of that name.")
    with _progress_bars(progress):
        folder = _download(name, repo, revision, [*DESCRIPTIONS, *(SAFETENSORS if weights else [])])
        if weights and not any(folder.glob("model*.safetensors*")):
            folder = _download(name, repo, revision, [*DESCRIPTIONS, *PICKLES])
    if not (folder / "config.json").is_file():
        raise OSError(f"{name} is no checkpoint: it has no config.json{_in_the_cache()}.")
    if weights:
        _check_weights(name, folder)
    return folder


def push_folder(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    progress: bool = True,
) -> str:
    """Publish a checkpoint folder in one commit, see [`push`]; returns the address to open."""
    return push(folder, repo, private=private, revision=revision, message=message, progress=progress).url


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    progress: bool = True,
) -> Pushed:
    """Publish a checkpoint folder on the Hub: weights, config, tokenizers, code and card in one commit.

    The folder is checked first, and gets the files that make it load without this package, and a model card if it
    has none. The repository and the branch are created where they are missing; nothing there is deleted.

    Args:
        folder: What `reccomp-hf convert`, or `save_pretrained` of model and processor, wrote.
        repo: Hub id, `owner/name`.
        private: Whether a new repository is private; `None` leaves it to the account's default.
        revision: Branch to commit to, the main one by default.
        message: Commit message.
        progress: Show the Hub client's progress bars.

    Raises:
        ValueError: The folder is no whole checkpoint, or does not go with what the repository holds.
        OSError: The Hub refused, or could not be reached; the message says what the branch holds.
    """
    path = Path(folder).expanduser()
    check_checkpoint(path)
    complete_folder(path, repo if "/" in repo else None)  # whose name it is without an owner, the Hub says
    files, branch = files_of(path), revision or constants.DEFAULT_REVISION
    api = HfApi(library_name="reccomp_hf")
    with _progress_bars(progress):
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            target = address.repo_id
            hidden = private and not api.model_info(target).private
            if not hidden:
                _make_branch(api, target, branch)
                before = api.model_info(target, revision=branch)
        except Exception as error:
            unreachable = NOT_REACHED.format(constants.ENDPOINT)
            reason = _reason(error, writing=True).replace("the upload broke off", unreachable)
            raise OSError(f"Nothing was sent to {repo}: {reason}.") from error
        if hidden:
            raise ValueError(
                f"{target} exists and is public, and private=True (--private) does not hide what is there."
            )
        _check_nothing_shadows(path, before, f"{target}@{branch}")
        # `upload_folder` makes several commits of a large folder on huggingface_hub 2.x.
        operations = [CommitOperationAdd(name, str(path / name)) for name in files]
        title = message or "Upload a compressed LLaVA with reccomp_hf"
        try:
            commit = api.create_commit(target, operations, commit_message=title, revision=branch)
        except Exception as error:
            raise OSError(_aftermath(api, path, before, target, branch, error)) from error
    url = str(address) if revision is None else f"{address}/tree/{branch}"
    return Pushed(target, branch, commit.oid, url, len(files), commit.oid != before.sha)


def _looks_like_a_path(name: str) -> bool:
    if name.startswith((".", "~", os.sep)) or name.endswith("/"):
        return True
    return os.path.isabs(name) or "\\" in name or name.count("/") > 1


@contextlib.contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """The client's progress bars as they are set, or off."""
    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# ---- down ----------------------------------------------------------------------------------------------------------


def _download(name: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    """A snapshot with the files that fit the patterns; every failure is an OSError with a sentence."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, library_name="reccomp_hf"))
    except Exception as error:  # the Hub's client raises errors of many libraries
        raise OSError(f"{name} is no folder, and {_reason(error)}.") from error


def _check_weights(name: str, folder: Path) -> None:
    """The client may fall back on a snapshot in the cache that an earlier download left incomplete."""
    if missing := missing_shards(folder):
        raise OSError(f"{name} lacks {len(missing)} of its weight files, {missing[0]} among them{_in_the_cache()}.")
    if not any(folder.glob("model*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise OSError(f"{name} has no weights: neither model*.safetensors nor pytorch_model*.bin{_in_the_cache()}.")


def _in_the_cache() -> str:
    if constants.HF_HUB_OFFLINE:
        return " in the cache, and HF_HUB_OFFLINE forbids to download; unset it and run it again"
    return ""


# ---- up ------------------------------------------------------------------------------------------------------------


def _make_branch(api: HfApi, repo: str, branch: str) -> None:
    if branch.startswith("refs/") or branch in [ref.name for ref in api.list_repo_refs(repo).branches]:
        return
    api.create_branch(repo, branch=branch, exist_ok=True)


def _check_nothing_shadows(folder: Path, before: Any, target: str) -> None:
    """Refuse to put shards beside a whole `model.safetensors`, which transformers would load in their stead."""
    there = {file.rfilename for file in before.siblings or ()}
    if "model.safetensors" in there and not (folder / "model.safetensors").exists():
        raise ValueError(
            f"{target} holds a model.safetensors, which would be loaded instead of this folder's shards. Nothing was "
            "sent. Delete it there, or push to another repository or branch (--revision)."
        )


def _aftermath(api: HfApi, folder: Path, before: Any, repo: str, branch: str, error: Exception) -> str:
    """What a commit that failed left behind, by asking the Hub."""
    failure = f"The push to {repo} failed: {_reason(error, writing=True)}"
    option = "" if branch == constants.DEFAULT_REVISION else f" --revision {branch}"
    again = f"`reccomp-hf push {folder} {repo}{option}` tries again and sends no file twice that the storage has"
    try:
        after = api.model_info(repo, revision=branch).sha
    except Exception:  # the same failure, most likely
        return (
            f"{failure}. Whether branch {branch!r} has the commit could not be asked: one commit carries everything, "
            f"so it has either all of it or is as it was. {again}."
        )
    if after == before.sha:
        return f"{failure}. Branch {branch!r} is as it was: nothing of a commit that fails is there. {again}."
    return f"{failure}. Yet branch {branch!r} has a new commit, {after}: look at it before you push again."


# ---- what the client's errors mean ---------------------------------------------------------------------------------


def _reason(error: BaseException, writing: bool = False) -> str:
    """The sentence, without its full stop, for an error of the Hub's client."""
    chain = list(_chain(error))
    answer = next((link for link in chain if _status(link) is not None), None)
    status = None if answer is None else _status(answer)
    if isinstance(error, HFValidationError):
        return "that is no name that a repository on the Hub can have"
    if writing and isinstance(error, ValueError) and error is not answer:  # the client's remarks on the card
        return " ".join(str(error).split())
    if isinstance(answer, GatedRepoError):
        return f"its repository is gated: accept its terms on {constants.ENDPOINT}, and {LOG_IN}"
    if isinstance(answer, RevisionNotFoundError):
        return "the repository on the Hub has no such revision"
    if status == 401:
        return f"the Hub asks who you are (401: no such repository, or a private one, or no valid token): {LOG_IN}"
    if isinstance(answer, RepositoryNotFoundError):
        return "no such repository is on the Hub, or it is private and your token may not read it (404)"
    if status == 403:
        return f"the Hub says that your token may not {'write' if writing else 'read'} there (403)"
    again = "" if writing else f". {AGAIN}"
    if answer is not None:
        words = getattr(answer, "server_message", None) or _first_line(answer)
        return f"the Hub answered {status}: {words.rstrip('.')}{again}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set" + ("" if writing else " and the cache does not hold it")
    what = f"{type(chain[-1]).__name__}: {_first_line(chain[-1])}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{NOT_REACHED.format(constants.ENDPOINT)} ({what}), and the cache does not hold it{again}"
    return f"the {'upload' if writing else 'download'} broke off ({what}){again}"


def _status(error: BaseException) -> int | None:
    """The status code of the Hub's answer, `None` for an error that is none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the latest first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")[:200]


__all__ = ["Pushed", "push", "push_folder", "resolve", "split_revision"]
