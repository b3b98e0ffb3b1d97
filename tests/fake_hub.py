"""A Hub of one's own on 127.0.0.1: the endpoints that `huggingface_hub` calls to list and download a model.

It keeps repositories in memory, records every request, and breaks where it is told to. It sends no Xet headers,
so that the client downloads over plain HTTP.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
WEB_PAGE = b"<!DOCTYPE html>\n<html><body>Please sign in to this network.</body></html>\n"

# A repository is "name" or "owner/name"; what is quoted in a revision is no path separator.
_API = re.compile(r"/api/models/(?P<repo>[^/]+(?:/[^/]+)??)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)??)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Fault:
    """What goes wrong with a file ("" is the list of files), and how many times.

    `kind` is a status; "cut", which closes the connection after half of the body (at once, where the client
    resumes); "short", which has fewer bytes than the HEAD request said; "hang", which never answers; or "blank",
    which answers 200 without the Hub's headers.
    """

    kind: int | str
    times: float = float("inf")
    methods: tuple[str, ...] = ("HEAD", "GET")


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # whose bearer may read it; None: everybody
    gated: bool = False
    faults: dict[str, Fault] = field(default_factory=dict)


class FakeHub:
    """Start with `with FakeHub() as hub`; give `hub.url` to the client as its endpoint."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[str] = []  # "GET /api/models/owner/name"
        self.authorizations: list[str | None] = []  # one for each request
        self.sent: dict[str, int] = {}  # bytes of each file's bodies
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a commit with these files at the branch or tag, made with the repository if need be; its hash."""
        repo = self.repos.setdefault(name, Repo())
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[branch] = commit
        return commit

    def fail(self, name: str, file: str, kind: int | str, **options) -> None:
        self.repos[name].faults[file] = Fault(kind, **options)

    def forget(self) -> None:
        self.requests.clear()
        self.authorizations.clear()

    def downloads(self) -> set[str]:
        """The files whose bodies were asked for."""
        paths = (request.split(" ", 1)[1] for request in self.requests if request.startswith("GET "))
        return {match["file"] for path in paths if (match := _RESOLVE.fullmatch(path))}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement

    def do_GET(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(f"{self.command} {path}")
        hub.authorizations.append(self.headers.get("Authorization"))
        match = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if match is None:
            return self.refuse(404)
        parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
        name, revision, file = parts["repo"], parts.get("revision", "main"), parts.get("file", "")
        if name in hub.renamed:
            return self.answer(307, headers={"Location": self.path.replace(name, hub.renamed[name], 1)})
        repo = hub.repos.get(name)
        if repo is None:
            # The real Hub does not tell strangers apart from typing errors.
            return self.refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            if self.headers.get("Authorization"):
                return self.refuse(401, message="Invalid credentials in Authorization header")
            return self.refuse(401, "RepoNotFound")
        if repo.gated and file:
            return self.refuse(403, "GatedRepo")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        fault = repo.faults.get(file)
        if fault and fault.times > 0 and self.command in fault.methods:
            fault.times -= 1
        else:
            fault = None
        if fault and isinstance(fault.kind, int):
            return self.refuse(fault.kind, "EntryNotFound" if fault.kind == 404 else None)
        if fault and fault.kind == "hang":
            hub.closing.wait(30)
            self.close_connection = True
            return None
        files = repo.commits[commit]
        if parts.get("what") == "tree":
            tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
            return self.answer(200, json.dumps(tree).encode())
        if not file:
            siblings = [{"rfilename": sibling} for sibling in files]
            body = WEB_PAGE if fault else json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
            return self.answer(200, body)
        if file not in files:
            return self.refuse(404, "EntryNotFound", commit=commit)
        return self.send_file(file, files[file], commit, fault.kind if fault else None)

    do_HEAD = do_GET

    def send_file(self, file: str, body: bytes, commit: str, fault: str | None) -> None:
        if fault == "blank":
            return self.answer(200, body)
        etag, size = hashlib.sha256(body).hexdigest(), len(body)
        headers = {"ETag": f'"{etag}"', "X-Linked-Size": str(size), "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        resumed = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(resumed[1]) if resumed else 0
        stop = min(size, int(resumed[2]) + 1) if resumed and resumed[2] else size
        if resumed:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        body = body[start:stop]
        if fault == "short":
            body = body[:-1]
        if self.command == "GET":
            self.server.hub.sent[file] = self.server.hub.sent.get(file, 0) + len(body)
        sent = (b"" if resumed else body[: len(body) // 2]) if fault == "cut" else None
        return self.answer(206 if resumed else 200, body, headers, sent)

    def refuse(self, status: int, code: str | None = None, message: str | None = None, commit: str | None = None):
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        return self.answer(status, b"{}", {key: value for key, value in headers.items() if value})

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, sent: bytes | None = None):
        """Answer with the body; `sent` is what of it goes out before the connection is closed."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else sent)
            self.close_connection = sent is not None

    def log_message(self, *arguments):
        pass
