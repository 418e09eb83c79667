"""A Hub on the loopback interface for the unmodified clients: models, commits, LFS, tokens, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ = "hf_writes", "hf_reads"


@dataclass
class Repo:
    """Commits by hash, branches by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    pull_requests: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What happens to the next `times` requests whose line contains `request`: a status, or a cut connection (None)."""

    request: str
    status: int | None
    times: int


class Hub:
    """The server; `repos`, `faults` and `lfs` are the test's to change, `requests` is what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lfs = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, as with the real one

    def forget(self) -> None:
        """Be as new."""
        self.repos, self.blobs, self.faults, self.requests, self.lfs = {}, {}, [], [], False

    def repo(self, repo_id: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(**options)
        repo.commit("main", files or {}, "initial commit")
        return repo


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        hub.requests.append(line)
        fault = next((fault for fault in hub.faults if fault.times and fault.request in line), None)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None:
            fault.times -= 1
            if fault.status is not None:
                self.rfile.read(length)
                return self._answer(fault.status, {"error": "not now"})
            if self.command in ("POST", "PUT"):
                self.rfile.read(length // 2)
                return self._cut()
            return self._file_in_part()
        body = self.rfile.read(length)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", READ, WRITE):
            return self._answer(
                401,
                {"error": "Invalid credentials"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, unquote(url.path))
            if method == self.command and match:
                return handler(self, token, body, parse_qs(url.query), **match.groupdict())
        self._answer(404, {"error": f"no route {line}"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _file_in_part(self) -> None:
        match = re.fullmatch(
            r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>.+?)/(?P<path>.+)", unquote(urlsplit(self.path).path)
        )
        content = self.hub.repos[match["repo"]].files(match["revision"])[match["path"]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self._cut()

    def _allowed(self, repo_id: str, token: str, *, writing: bool = False) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not token):
            self._answer(401 if not token else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and not writing and token != WRITE:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif writing and not token:
            self._answer(401, {"error": "log in"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif writing and token != WRITE:
            self._answer(403, {"error": "forbidden"}, {"X-Error-Message": "this token cannot write"})
        else:
            return repo
        return None

    def _create(self, token: str, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not token:
            return self._answer(401, {"error": "log in"}, {"X-Error-Message": "Invalid username or password."})
        if token != WRITE:
            return self._answer(403, {"error": "forbidden"}, {"X-Error-Message": "this token cannot write"})
        known = repo_id in self.hub.repos
        if not known:
            self.hub.repo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._answer(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "error": "exists"})

    def _yaml(self, token: str, body: bytes, query: Any) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _branch(self, token: str, body: bytes, query: Any, repo: str, revision: str) -> None:
        if found := self._allowed(repo, token, writing=True):
            known = revision in found.branches
            found.branches.setdefault(revision, found.branches["main"])
            self._answer(409 if known else 200, {"error": "exists"})

    def _preupload(self, token: str, body: bytes, query: Any, repo: str, revision: str) -> None:
        if self._allowed(repo, token, writing="create_pr" not in query):
            mode = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": file["path"],
                    "uploadMode": mode[self.hub.lfs and file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})

    def _lfs_batch(self, token: str, body: bytes, query: Any, repo: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self._answer(200, {"objects": objects, "transfer": "basic"})

    def _lfs_put(self, token: str, body: bytes, query: Any, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def _lfs_get(self, token: str, body: bytes, query: Any, oid: str) -> None:
        self._answer(200, self.hub.blobs[oid])

    def _commit(self, token: str, body: bytes, query: Any, repo: str, revision: str) -> None:
        found = self._allowed(repo, token, writing="create_pr" not in query)
        if found is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(found.files(revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
                found.lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        pull = f"refs/pr/{len(found.pull_requests) + 1}" if "create_pr" in query else None
        oid = found.commit(pull or revision, files, lines[0]["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
        if pull:
            found.pull_requests.append(pull)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{len(found.pull_requests)}"
        self._answer(200, answer)

    def _revision(self, token: str, body: bytes, query: Any, repo: str, revision: str = "main") -> None:
        if found := self._allowed(repo, token):
            files = [{"rfilename": path} for path in found.files(revision)]
            sha = found.branches.get(revision, revision)
            self._answer(200, {"id": repo, "sha": sha, "private": found.private, "siblings": files, "tags": []})

    def _tree(self, token: str, body: bytes, query: Any, repo: str, revision: str) -> None:
        if found := self._allowed(repo, token):
            self._answer(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in found.files(revision).items()
                ],
            )

    def _resolve(self, token: str, body: bytes, query: Any, repo: str, revision: str, path: str) -> None:
        found = self._allowed(repo, token)
        if found is None:
            return
        oid = found.branches.get(revision, revision)
        if oid not in found.commits:
            return self._answer(404, {"error": "revision"}, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": oid}
        content = found.commits[oid].get(path)
        if content is None:
            return self._answer(404, {"error": "entry"}, {**headers, "X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(content).hexdigest()
        headers["ETag"] = f'"{digest}"'
        if path in found.lfs:
            linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self._answer(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{digest}"})
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            rest = content[int(start[1]) :]
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            return self._answer(206, rest, headers)
        self._answer(200, content, headers)


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._yaml),
    ("POST", f"{_MODEL}/branch/(?P<revision>.+)", _Handler._branch),
    ("POST", f"{_MODEL}/preupload/(?P<revision>.+)", _Handler._preupload),
    ("POST", f"{_MODEL}/commit/(?P<revision>.+)", _Handler._commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/lfs/(?P<oid>.+)", _Handler._lfs_put),
    ("GET", "/lfs/(?P<oid>.+)", _Handler._lfs_get),
    ("HEAD", "/lfs/(?P<oid>.+)", _Handler._lfs_get),
    ("GET", _MODEL, _Handler._revision),
    ("GET", f"{_MODEL}/revision/(?P<revision>.+)", _Handler._revision),
    ("GET", f"{_MODEL}/tree/(?P<revision>[^/]+)(/.*)?", _Handler._tree),
    *(
        (method, r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler._resolve)
        for method in ("GET", "HEAD")
    ),
]
