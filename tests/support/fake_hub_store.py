"""What the fake Hub of `fake_hub.py` holds, in memory, who may do what with it, and what is to go wrong."""

import dataclasses
import fnmatch
import hashlib
import json
import threading

LARGE = ("*.safetensors", "*.bin", "*.model")


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file's content; a large one is known by its sha256."""

    data: bytes
    large: bool

    @property
    def oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.large else self.oid


@dataclasses.dataclass(frozen=True)
class Commit:
    """A commit: its tree is a dict of paths to blobs."""

    title: str
    tree: dict
    parent: str | None
    sha: str


@dataclasses.dataclass
class Repo:
    """A repository with its history; `readers` are who accepted the terms of a gated one, `sdk` is a Space's."""

    id: str
    private: bool = False
    sdk: str | None = None
    gated: bool = False
    readers: set = dataclasses.field(default_factory=set)
    commits: dict = dataclasses.field(default_factory=dict)
    branches: dict = dataclasses.field(default_factory=dict)

    def commit(self, branch, title, tree):
        parent = self.branches.get(branch)
        text = json.dumps([parent, title, sorted((path, blob.oid) for path, blob in tree.items()), len(self.commits)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = Commit(title, tree, parent, sha)
        self.branches[branch] = sha
        return sha

    def at(self, revision):
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, revision="main"):
        """Commits from the latest to the first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def files(self, revision="main"):
        return {path: blob.data for path, blob in self.at(revision).tree.items()}


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status, message, code=None, headers=()):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers)


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path has a piece in it.

    `status` answers with that, `cut` drops the connection after so many bytes of the request's body (PUT, POST) or of
    the answer's (GET), `corrupt` flips a bit of what arrived, `silent` does all the work and drops the connection.
    """

    method: str
    piece: str
    status: int | None = None
    cut: int | None = None
    corrupt: bool = False
    silent: bool = False
    times: int = 1
    skip: int = 0  # requests that go well before


class Store:
    """All repositories, who may do what, and a log: (method, path, status, Range header) of every request."""

    def __init__(self):
        self.repos, self.large, self.parts, self.faults, self.log = {}, {}, {}, [], []
        self.mistakes = []  # tracebacks of the fake Hub itself
        self.members = {"me": {"me", "org"}, "stranger": {"stranger"}}
        self.tokens = {f"hf_{user}": user for user in self.members}
        self.part_size = None  # larger files are uploaded in parts of so many bytes
        self.lock = threading.RLock()

    def make(self, repo_id, folder=None, **settings):
        """A repository without the network; with a folder, a second commit holds its files."""
        repo = self.repos[repo_id] = Repo(repo_id, **settings)
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        if folder is not None:
            files = [path for path in folder.rglob("*") if path.is_file()]
            blobs = {
                str(path.relative_to(folder)): Blob(path.read_bytes(), self.is_large(path.name, 0)) for path in files
            }
            repo.commit("main", "files", {**repo.at("main").tree, **blobs})
        return repo

    def break_next(self, method, piece, **what):
        self.faults.append(Fault(method, piece, **what))

    def requests(self, method, piece):
        return [entry for entry in self.log if entry[0] == method and piece in entry[1]]

    def is_large(self, path, size):
        return size > 10_000_000 or any(fnmatch.fnmatch(path, pattern) for pattern in LARGE)

    def readable(self, repo_id, user, content=False):
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self.may_write(repo_id, user)):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and user not in repo.readers and not self.may_write(repo_id, user):
            raise Refusal(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    def may_write(self, repo_id, user):
        return repo_id.split("/")[0] in self.members.get(user, ())

    def writable(self, repo_id, user):
        repo = self.readable(repo_id, user)
        if not self.may_write(repo_id, user):
            raise Refusal(403 if user else 401, "You don't have the rights to write here.")
        return repo
