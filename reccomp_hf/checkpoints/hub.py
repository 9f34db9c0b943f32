"""The Hugging Face Hub: downloading a checkpoint into a local folder, and pushing a folder in one commit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..core.remote_code import code_files
from ..core.settings import did_you_mean
from ..demo import CHECKPOINTS
from .completeness import check_checkpoint, complete_folder, files_of
from .weight_files import NO_WEIGHTS, PICKLES, SAFETENSORS, WeightFiles

DESCRIPTIONS = ["*.json", "*.jinja", "*.model", "*merges.txt", "*vocab.txt", "README.md", "LICENSE*"]
"""Patterns of the files that a checkpoint is downloaded with besides its weights."""
NOT_REACHED = "the Hub at {} cannot be reached"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "Run it again: complete files are in the cache and are not downloaded twice"


@dataclasses.dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        repo: Id of the repository, with its owner.
        branch: Branch of the commit.
        commit: Hash of the commit; the branch's old one if nothing had changed.
        url: Address of the repository, or of the branch if one was named.
        files: Number of files of the checkpoint.
        changed: Whether there was anything to commit.
        removed: Code files of an older layout that the commit removed.
    """

    repo: str
    branch: str
    commit: str
    url: str
    files: int
    changed: bool
    removed: list[str]


def split_revision(source: str) -> tuple[str, str | None]:
    """`org/name@revision` as its two parts; the revision is `None` if none is named."""
    name, _, revision = source.partition("@")
    return name, revision or None


def resolve(source: str | os.PathLike[str], *, weights: bool = True, progress: bool = True) -> Path:
    """The folder of a checkpoint: the one that `source` names, or a download from the Hub.

    Args:
        source: A folder, a Hub id, or `org/name@revision`, where the revision is a branch, a tag or a commit.
        weights: Download the weights too: safetensors, or PyTorch's own files from a repository without safetensors.
        progress: Show the Hub client's progress bars.

    Raises:
        FileNotFoundError: `source` is written as a path that does not exist.
        OSError: The repository does not exist, access is denied, the Hub cannot be reached, or the download failed.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file; name the folder of a checkpoint.")
    repo, revision = split_revision(name)
    if _looks_like_a_path(repo):
        raise FileNotFoundError(f"{name} does not exist.")
    if "/" not in repo and (hint := did_you_mean(repo, CHECKPOINTS)):
        raise FileNotFoundError(f"There is no folder {name}; {hint} It comes with this package.")
    with progress_bars(progress):
        folder = _download(name, repo, revision, [*DESCRIPTIONS, *(SAFETENSORS if weights else [])])
        if weights and not WeightFiles.find(folder).safetensors:
            folder = _download(name, repo, revision, [*DESCRIPTIONS, *PICKLES])
    if not (folder / "config.json").is_file():
        raise OSError(f"{name} is not a checkpoint: it has no config.json{_in_the_cache()}.")
    if weights:
        _check_weights(name, folder)
    return folder


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

    The folder is checked first. It gets the code that loads it without this package, in place of code of an older
    layout, and a model card if it has none. The repository and the branch are created if they do not exist. The commit
    deletes code files that an older version of this package pushed and the new code does not need; no other file is
    deleted. `model.push_to_hub` of transformers only adds files: it leaves the old code in the repository, where a
    later push does not find it, because the new code does not import it.

    Args:
        folder: A folder written by `reccomp-hf convert`, or by `save_pretrained` of model and processor.
        repo: Hub id, `owner/name`.
        private: Whether a new repository is private; `None` is the account's default.
        revision: Branch to commit to; the main branch by default.
        message: Commit message.
        progress: Show the Hub client's progress bars.

    Raises:
        ValueError: The folder is not a complete checkpoint, or its weights would be shadowed by the repository's.
        OSError: The Hub refused the push or could not be reached; the message says what the branch holds.
    """
    path = Path(folder).expanduser()
    check_checkpoint(path)
    complete_folder(path, repo if "/" in repo else None)  # without an owner the full id is not known yet
    files, branch = files_of(path), revision or constants.DEFAULT_REVISION
    api = HfApi(library_name="reccomp_hf")
    with progress_bars(progress):
        with before_sending(repo):
            address = api.create_repo(repo, private=private, exist_ok=True)
            target = address.repo_id
            hidden = not private or bool(api.model_info(target).private)
        check_hidden(target, hidden)
        with before_sending(repo):
            make_branch(api, target, branch)
            before = api.model_info(target, revision=branch)
            stale = _stale_code(target, before, files)
        _check_nothing_shadows(path, before, f"{target}@{branch}")
        # `upload_folder` makes several commits of a large folder on huggingface_hub 2.x.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, str(path / name)) for name in files]
        title = message or "Upload a compressed LLaVA with reccomp_hf"
        try:
            commit = api.create_commit(target, operations, commit_message=title, revision=branch)
        except Exception as error:
            raise OSError(_aftermath(api, path, before, target, branch, error)) from error
    url = str(address) if revision is None else f"{address}/tree/{branch}"
    return Pushed(target, branch, commit.oid, url, len(files), commit.oid != before.sha, stale)


def check_hidden(repo: str, hidden: bool) -> None:
    """Refuse to push into a public repository what shall be private.

    Args:
        repo: Hub id.
        hidden: Whether the repository is private, or need not be.

    Raises:
        ValueError: It is public.
    """
    if not hidden:
        raise ValueError(
            f"{repo} exists and is public; private=True (--private) would not hide it. Make it private on the "
            "Hub first, or leave the option out."
        )


def _looks_like_a_path(name: str) -> bool:
    if name.startswith((".", "~", os.sep)) or name.endswith("/"):
        return True
    return os.path.isabs(name) or "\\" in name or name.count("/") > 1


@contextlib.contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Leave the client's progress bars as they are if wanted, else turn them off."""
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
    """A snapshot of the files that match the patterns; every failure is an OSError with one sentence."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, library_name="reccomp_hf"))
    except Exception as error:  # the Hub's client raises errors of many libraries
        raise OSError(f"{name} is not a folder, and {reason_of(error)}.") from error


def _check_weights(name: str, folder: Path) -> None:
    """Check a snapshot: the client may fall back on one in the cache that an earlier download left incomplete."""
    files = WeightFiles.find(folder)
    if not files.names:
        raise OSError(f"{NO_WEIGHTS.format(name)}{_in_the_cache()}.")
    if files.missing:
        raise OSError(f"{name} lacks {files.describe_missing()}{_in_the_cache()}.")


def _in_the_cache() -> str:
    if constants.HF_HUB_OFFLINE:
        return " in the cache, and HF_HUB_OFFLINE forbids downloads; unset it and run it again"
    return ""


# ---- up ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def before_sending(repo: str) -> Iterator[None]:
    """Turn errors of the client's into an OSError that says that nothing was sent."""
    try:
        yield
    except Exception as error:
        unreachable = NOT_REACHED.format(constants.ENDPOINT)
        reason = reason_of(error, writing=True).replace("the upload was interrupted", unreachable)
        raise OSError(f"Nothing was sent to {repo}: {reason}.") from error


def make_branch(api: HfApi, repo: str, branch: str, repo_type: str = "model") -> None:
    """Create a branch unless it exists."""
    branches = api.list_repo_refs(repo, repo_type=repo_type).branches
    if branch.startswith("refs/") or branch in [ref.name for ref in branches]:
        return
    api.create_branch(repo, branch=branch, repo_type=repo_type, exist_ok=True)


def _files_in(before: Any) -> set[str]:
    """Paths of the files of a repository at a commit."""
    return {file.rfilename for file in before.siblings or ()}


def _stale_code(repo: str, before: Any, files: list[str]) -> list[str]:
    """Code files of this package that a repository holds and a push does not replace.

    They are found by the imports of the entry files there, so that other Python files stay, whatever their names.
    """
    modules = sorted(name for name in _files_in(before) if name.endswith(".py") and "/" not in name)
    if set(modules) <= set(files):
        return []
    with progress_bars(wanted=False):
        snapshot = snapshot_download(repo, revision=before.sha, allow_patterns=modules, library_name="reccomp_hf")
    return sorted({file.name for file in code_files(Path(snapshot))} - set(files))


def _check_nothing_shadows(folder: Path, before: Any, target: str) -> None:
    """Refuse to push shards to a repository with a `model.safetensors`, which transformers would load instead."""
    if "model.safetensors" in _files_in(before) and not (folder / "model.safetensors").exists():
        raise ValueError(
            f"{target} holds a model.safetensors, which would be loaded instead of this folder's shards. Nothing was "
            "sent. Delete that file there, or push to another repository or branch (--revision)."
        )


def _aftermath(api: HfApi, folder: Path, before: Any, repo: str, branch: str, error: Exception) -> str:
    """The message for a failed commit, with the state of the branch as the Hub reports it."""
    failure = f"The push to {repo} failed: {reason_of(error, writing=True)}"
    option = "" if branch == constants.DEFAULT_REVISION else f" --revision {branch}"
    again = f"`reccomp-hf push {folder} {repo}{option}` tries again, without the files that the storage already has"
    try:
        after = api.model_info(repo, revision=branch).sha
    except Exception:  # the same failure, most likely
        return (
            f"{failure}. Whether branch {branch!r} has the commit is not known: the Hub cannot be asked. It has "
            f"either all of the commit or none of it. {again}."
        )
    if after == before.sha:
        return f"{failure}. Branch {branch!r} is unchanged. {again}."
    return f"{failure}. Yet branch {branch!r} has a new commit, {after}: check it before you push again."


# ---- the client's errors ---------------------------------------------------------------------------------


def reason_of(error: BaseException, writing: bool = False) -> str:
    """One sentence, without its full stop, for an error of the Hub's client."""
    chain = list(_chain(error))
    answer = next((link for link in chain if _status(link) is not None), None)
    status = None if answer is None else _status(answer)
    if isinstance(error, HFValidationError):
        return "that is not a valid name of a repository on the Hub"
    if writing and isinstance(error, ValueError) and error is not answer:  # the client's errors about the card
        return " ".join(str(error).split())
    if isinstance(answer, GatedRepoError):
        return f"its repository is gated: accept its terms on {constants.ENDPOINT}, and {LOG_IN}"
    if isinstance(answer, RevisionNotFoundError):
        return "the repository on the Hub has no such revision"
    if status == 401:
        return f"the Hub requires a login (401: no such repository, a private one, or an invalid token): {LOG_IN}"
    if isinstance(answer, RepositoryNotFoundError):
        return "the Hub has no such repository, or it is private and your token cannot read it (404)"
    if status == 403:
        return f"your token may not {'write' if writing else 'read'} there (403)"
    again = "" if writing else f". {AGAIN}"
    if answer is not None:
        words = getattr(answer, "server_message", None) or _first_line(answer)
        return f"the Hub answered {status}: {words.rstrip('.')}{again}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set" + ("" if writing else " and it is not in the cache")
    what = f"{type(chain[-1]).__name__}: {_first_line(chain[-1])}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{NOT_REACHED.format(constants.ENDPOINT)} ({what}), and it is not in the cache{again}"
    return f"the {'upload' if writing else 'download'} was interrupted ({what}){again}"


def _status(error: BaseException) -> int | None:
    """The status code of the Hub's answer; `None` for an error without one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, the latest first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")[:200]


__all__ = [
    "Pushed",
    "before_sending",
    "check_hidden",
    "make_branch",
    "progress_bars",
    "push",
    "reason_of",
    "resolve",
    "split_revision",
]
