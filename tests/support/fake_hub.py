"""The Hub's HTTP API on 127.0.0.1, for the real `huggingface_hub` client to speak to.

It answers with the status codes and headers of the real one; `fake_hub_store.py` has what it answers with, and the
faults that break a request on purpose.
"""

import base64
import contextlib
import datetime
import hashlib
import json
import re
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from fake_hub_store import Blob, Refusal, Store

REVISION = "(?P<revision>[^/]+)"
REPO = "(?P<repo>[^/]+/[^/]+)"
API = "/api/(?:models|spaces)"


class FakeHub(Store):
    """The server: `with FakeHub() as hub`."""

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def entry_of(path, blob, name="path"):
    """A file of a tree listing, or of a model's siblings."""
    oid = {"path": "oid", "rfilename": "blobId"}[name]
    large = {"size": len(blob.data), "pointerSize": 130, ("oid" if name == "path" else "sha256"): blob.sha256}
    return {name: path, oid: blob.oid, "size": len(blob.data), **({"lfs": large} if blob.large else {})}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    routes: list = []  # method, pattern, function

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer(self):
        self.query = parse_qs(urlsplit(self.path).query)
        path = urlsplit(self.path).path
        self.fault = self.take_fault(path)
        try:
            self.body = self.read_body()
            if self.body is None:
                return self.hang_up(path)
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "The server is broken on purpose")
            self.check_kind(path)
            for method, pattern, function in self.routes:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    with self.hub.lock:
                        status, headers, data = function(
                            self, **{name: unquote(value) for name, value in match.groupdict().items() if value}
                        )
                    break
            else:
                raise Refusal(404, f"The fake Hub knows no {self.command} {path}")
        except Refusal as refusal:
            status, data = refusal.status, json.dumps({"error": refusal.message}).encode()
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        except Exception:
            self.hub.mistakes.append(traceback.format_exc())
            raise
        if self.fault and self.fault.silent:
            return self.hang_up(path)
        self.send(path, status, headers, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def check_kind(self, path):
        """A Space is found among Spaces alone, a model among models."""
        found = re.match(f"/api/(models|spaces)/{REPO}", path)
        repo = self.hub.repos.get(found["repo"]) if found else None
        if repo and (repo.sdk is not None) != (found[1] == "spaces"):
            raise Refusal(404, "Repository not found", "RepoNotFound")

    def take_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and fault.piece in unquote(path):
                    fault.skip -= 1
                    if fault.skip < 0:
                        fault.times -= 1
                        return fault
        return None

    def hang_up(self, path):
        self.hub.log.append((self.command, unquote(path), None, self.headers.get("Range")))
        self.close_connection = True

    def read_body(self):
        """The request's body, `None` if the connection is to be dropped in it."""
        if self.fault and self.fault.cut is not None and self.command in ("PUT", "POST"):
            self.rfile.read(self.fault.cut)
            return None
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fault and self.fault.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return body

    def send(self, path, status, headers, data):
        self.hub.log.append((self.command, unquote(path), status, self.headers.get("Range")))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None and status in (200, 206):
            data = data[: self.fault.cut]
            self.close_connection = True
        self.wfile.write(data)

    @property
    def user(self):
        """Who asks, `None` for nobody in particular."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def json(self):
        return json.loads(self.body)


def route(method, pattern):
    """Register an answer: a function of the handler and the pattern's groups that gives status, headers and data."""

    def register(function):
        Handler.routes.append((method, pattern, function))
        return function

    return register


def reply(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


@route("GET", "/api/whoami-v2")
def whoami(request):
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = sorted(request.hub.members[request.user] - {request.user})
    return reply({"type": "user", "name": request.user, "orgs": [{"name": name} for name in orgs], "auth": {}})


@route("POST", "/api/repos/create")
def create_repo(request):
    values, user = request.json(), request.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    repo_id = f"{values.get('organization') or user}/{values['name']}"
    is_space = values.get("type") == "space"
    address = {"url": f"{request.hub.url}/{'spaces/' if is_space else ''}{repo_id}", "name": repo_id}
    if not request.hub.may_write(repo_id, user):
        raise Refusal(
            403, f"You don't have the rights to create a model under the namespace {repo_id.split('/')[0]!r}"
        )
    if repo_id in request.hub.repos:
        return reply({"error": "You already created this model repo", **address}, 409)
    private = bool(values.get("private")) or values.get("visibility") == "private"
    request.hub.make(repo_id, private=private, sdk=values["sdk"] if is_space else None)
    return reply(address)


@route("POST", "/api/validate-yaml")
def validate_yaml(request):
    card = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(card[1]) if card else None
    except yaml.YAMLError as error:
        return reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return reply({"errors": [], "warnings": warnings})


@route("GET", "/api/models")
def list_models(request):
    author, hub = request.query["author"][0], request.hub
    mine = [repo for name, repo in sorted(hub.repos.items()) if name.startswith(f"{author}/")]
    mine = [repo for repo in mine if not repo.private or hub.may_write(repo.id, request.user)]
    return reply([{"id": repo.id, "private": repo.private} for repo in mine])


@route("GET", f"{API}/{REPO}(/revision/{REVISION})?")
def model_info(request, repo, revision="main"):
    found = request.hub.readable(repo, request.user)
    commit = found.at(revision)
    siblings = [entry_of(path, blob, "rfilename") for path, blob in sorted(commit.tree.items())]
    if "blobs" not in request.query:
        siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
    gated = "manual" if found.gated else False
    return reply({"id": repo, "sha": commit.sha, "private": found.private, "gated": gated, "siblings": siblings})


@route("GET", f"{API}/{REPO}/tree/{REVISION}(/(?P<folder>.+))?")
def list_tree(request, repo, revision, folder=""):
    commit = request.hub.readable(repo, request.user).at(revision)
    prefix = f"{folder}/" if folder else ""
    inside = {path: blob for path, blob in commit.tree.items() if path.startswith(prefix)}
    if folder and not inside:
        raise Refusal(
            404, f"{folder} does not exist on {revision!r}", "EntryNotFound", [("X-Repo-Commit", commit.sha)]
        )
    deep = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    files = {path: blob for path, blob in inside.items() if deep or "/" not in path.removeprefix(prefix)}
    folders = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
    folders = {path for path in folders if path.startswith(prefix) and (deep or "/" not in path.removeprefix(prefix))}
    return reply(
        [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        + [{"type": "file", **entry_of(path, blob)} for path, blob in sorted(files.items())]
    )


@route("GET", f"{API}/{REPO}/refs")
def list_refs(request, repo):
    branches = request.hub.readable(repo, request.user).branches
    heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
    return reply({"branches": heads, "converts": [], "tags": []})


@route("GET", f"{API}/{REPO}/commits/{REVISION}")
def list_commits(request, repo, revision):
    date = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    history = request.hub.readable(repo, request.user).history(revision)
    return reply(
        [{"id": c.sha, "title": c.title, "message": "", "authors": [{"user": "me"}], "date": date} for c in history]
    )


@route("POST", f"{API}/{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(request, repo, branch):
    found = request.hub.writable(repo, request.user)
    if branch in found.branches:
        raise Refusal(409, "Reference already exists")
    found.branches[branch] = found.at(request.json().get("startingPoint", "main")).sha
    return reply({})


@route("POST", f"{API}/{REPO}/preupload/{REVISION}")
def preupload(request, repo, revision):
    tree = request.hub.writable(repo, request.user).at(revision).tree
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if request.hub.is_large(file["path"], file["size"]) else "regular",
            "shouldIgnore": False,
            "oid": tree[file["path"]].etag if file["path"] in tree else None,
        }
        for file in request.json()["files"]
    ]
    return reply({"files": files})


@route("POST", f"(?:/spaces)?/{REPO}[.]git/info/lfs/objects/batch")
def large_batch(request, repo):
    request.hub.writable(repo, request.user)
    return reply(
        {"transfer": "basic", "objects": [large_object(request.hub, item) for item in request.json()["objects"]]}
    )


def large_object(hub, item):
    """How an object is to be uploaded: not at all, whole, or in parts."""
    oid, size, store = item["oid"], item["size"], f"{hub.url}/storage/{item['oid']}"
    if oid in hub.large:
        return {"oid": oid, "size": size}
    upload, verify = {"href": store}, {"href": f"{store}/verify"}
    if hub.part_size and size > hub.part_size:
        numbers = range(1, -(-size // hub.part_size) + 1)
        header = {"chunk_size": str(hub.part_size), **{f"{n:05}": f"{store}/part/{n}" for n in numbers}}
        upload = {"href": f"{store}/complete", "header": header}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def store(hub, oid, data):
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "The content does not have the announced sha256")
    hub.large[oid] = data
    return reply({})


@route("PUT", "/storage/(?P<oid>[0-9a-f]+)")
def put_large(request, oid):
    return store(request.hub, oid, request.body)


@route("PUT", "/storage/(?P<oid>[0-9a-f]+)/part/(?P<number>[0-9]+)")
def put_part(request, oid, number):
    request.hub.parts[oid, int(number)] = request.body
    return 200, {"ETag": f'"{number}"'}, b""


@route("POST", "/storage/(?P<oid>[0-9a-f]+)/complete")
def complete_large(request, oid):
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    return store(request.hub, oid, b"".join(request.hub.parts[oid, number] for number in numbers))


@route("POST", "/storage/(?P<oid>[0-9a-f]+)/verify")
def verify_large(request, oid):
    if len(request.hub.large.get(oid, b"")) != request.json()["size"]:
        raise Refusal(404, "The object is not in the storage")
    return reply({})


@route("POST", f"{API}/{REPO}/commit/{REVISION}")
def commit(request, repo, revision):
    found = request.hub.writable(repo, request.user)
    if revision not in found.branches:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    tree, title = dict(found.at(revision).tree), ""
    for line in map(json.loads, request.body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            title = value["summary"]
        elif line["key"] == "file":
            tree[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
        elif line["key"] == "lfsFile" and value["oid"] in request.hub.large:
            tree[value["path"]] = Blob(request.hub.large[value["oid"]], large=True)
        elif line["key"] == "deletedFile" and value["path"] in tree:
            del tree[value["path"]]
        else:
            raise Refusal(400, f"{line['key']} of {value.get('path')} cannot be committed")
    sha = found.commit(revision, title, tree)
    return reply({"success": True, "commitOid": sha, "commitUrl": f"{request.hub.url}/{repo}/commit/{sha}"})


@route("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def download(request, repo, revision, path):
    commit = request.hub.readable(repo, request.user, content=True).at(revision)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if path not in commit.tree:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers.items())
    blob, status = commit.tree[path], 200
    data, headers["ETag"] = blob.data, f'"{blob.etag}"'
    if blob.large:
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{blob.sha256}"'}
    if found := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        if start >= len(data):
            raise Refusal(416, "Range not satisfiable", None, [("Content-Range", f"bytes */{len(data)}")])
        headers["Content-Range"], status = f"bytes {start}-{end}/{len(data)}", 206
        data = data[start : end + 1]
    return status, headers, data
