"""Pushing a Space to the Hugging Face Hub in one commit."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.repocard import RepoCard

from .hub import Pushed, before_sending, check_hidden, make_branch, progress_bars, reason_of

_APP, _CARD = "app.py", "README.md"
_COPY = "reccomp_hf/"
"""The copy of this package in a Space, whose old files leave with a newer copy."""


def push_space(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    progress: bool = True,
) -> Pushed:
    """Publish a folder that `reccomp-hf app MODEL --space` wrote as a Gradio Space, in one commit.

    The repository and the branch are created if they do not exist. Files of an older copy of this package are
    deleted; no other file is.

    Args:
        folder: The folder; hidden files and Python's caches stay here.
        repo: Id of the Space, `owner/name`.
        private: Whether a new repository is private; `None` is the account's default.
        revision: Branch to commit to; the main branch by default.
        message: Commit message.
        progress: Show the Hub client's progress bars.

    Raises:
        ValueError: The folder is not a Space, or the repository is public and shall be private.
        OSError: The Hub refused the push or could not be reached.
    """
    path = Path(folder).expanduser()
    _check_space(path)
    files, branch = _files_of(path), revision or constants.DEFAULT_REVISION
    api = HfApi(library_name="reccomp_hf")
    with progress_bars(progress):
        with before_sending(repo):
            address = api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
            target = address.repo_id
            make_branch(api, target, branch, "space")
            before = api.space_info(target, revision=branch)
        check_hidden(target, not private or bool(before.private))
        there = {file.rfilename for file in before.siblings or ()}
        stale = sorted(name for name in there - set(files) if name.startswith(_COPY))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, str(path / name)) for name in files]
        title = message or "Upload the page of a compressed LLaVA with reccomp_hf"
        try:
            commit = api.create_commit(target, operations, commit_message=title, revision=branch, repo_type="space")
        except Exception as error:
            raise OSError(f"The push to {target} failed: {reason_of(error, writing=True)}.") from error
    url = str(address) if revision is None else f"{address}/tree/{branch}"
    return Pushed(target, branch, commit.oid, url, len(files), commit.oid != before.sha, stale)


def _check_space(folder: Path) -> None:
    """Refuse a folder that is not a Gradio Space.

    Raises:
        ValueError: It is not.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: `reccomp-hf app MODEL --space {folder}` writes one.")
    missing = [name for name in (_APP, _CARD, "requirements.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not a Space, it has no {', '.join(missing)}: `reccomp-hf app MODEL --space DIR` writes one."
        )
    try:
        sdk = RepoCard((folder / _CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("sdk")
    except Exception as error:
        raise ValueError(f"The metadata of {folder / _CARD} cannot be read: {error}.") from error
    if sdk != "gradio":
        raise ValueError(f"{folder / _CARD} must say `sdk: gradio`, got {sdk!r}.")


def _files_of(folder: Path) -> list[str]:
    """Files of a Space by their paths in it, without hidden ones and Python's caches."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [
        file.as_posix()
        for file in files
        if not any(part.startswith(".") or part == "__pycache__" for part in file.parts)
    ]


__all__ = ["push_space"]
