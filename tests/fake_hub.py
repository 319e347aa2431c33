"""A Hugging Face hub on this machine: one HTTP server that serves repositories from memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_LARGE = (".safetensors", ".gguf", ".bin", "tokenizer.json")
"""Files that repositories keep in Git LFS: the hub names them by the SHA-256 of their content."""
_POLL = 0.01
"""Seconds until the server notices that it should end; half a second by default."""


@dataclass
class Repository:
    """Every commit's files, and the commits that branches and tags name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    pipeline: str | None = None
    gguf: dict[str, Any] | None = None


class FakeHub:
    """`publish` repositories, point HF_ENDPOINT at `url`, and see what was requested.

    downloads: the files fetched. traffic: path and bytes of the body of every request answered. cut: by names of files,
    how many more bytes of them are sent; then connections break off.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[str] = []
        self.traffic: list[tuple[str, int]] = []
        self.cut: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL,), daemon=True)
        self._thread.start()

    def publish(
        self,
        repository: str,
        directory: Path | None = None,
        extra: dict[str, bytes] | None = None,
        *,
        revision: str = "main",
        card: dict[str, Any] | None = None,
        pipeline: str | None = None,
        gguf: dict[str, Any] | None = None,
    ) -> str:
        """Put the files of a directory up as the newest commit of a branch, and return the commit's id.

        card: the model card's metadata. gguf: what the hub says of a GGUF file.
        """
        paths = [path for path in directory.rglob("*") if path.is_file()] if directory is not None else []
        files = {path.relative_to(directory or ".").as_posix(): path.read_bytes() for path in paths} | (extra or {})
        content = "".join(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        found = self.repositories.setdefault(repository, Repository())
        found.commits[commit] = files
        found.revisions[revision] = commit
        found.card |= card or {}
        found.pipeline = pipeline
        found.gguf = gguf
        return commit

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def bytes_sent(self) -> int:
        return sum(nbytes for _, nbytes in self.traffic)

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        status, headers, data = self._respond(request)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if wanted and status == 200:
            end = int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {wanted[1]}-{end}/{len(data)}"
            status, data = 206, data[int(wanted[1]) : end + 1]
        whole, file = len(data), headers.get("X-File", "")
        if body and file in self.cut:
            data = data[: self.cut[file]]
            self.cut[file] -= len(data)
        # Before the answer: a test may look as soon as the client has it.
        self.traffic.append((request.path, len(data) if body else 0))
        if body and "ETag" in headers:
            self.downloads.append(headers["X-File"])
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(whole))
        request.end_headers()
        if body:
            request.wfile.write(data)
        if len(data) < whole:
            request.close_connection = True

    def _respond(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and the whole body."""
        parts = urlsplit(request.path)
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        api = path[:2] == ["api", "models"]
        owner, name, *rest = path[2:] if api else path
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revision = rest[1] if len(rest) > 1 else "main"  # after "revision", "tree" or "resolve"
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = repository.commits[commit]
        if api:
            blobs = "blobs" in parse_qs(parts.query)
            answer: Any = _tree(files) if rest[:1] == ["tree"] else _info(f"{owner}/{name}", commit, repository, blobs)
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        file = "/".join(rest[2:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(file, files[file])}"', "X-File": file}
        return 200, headers | {"Accept-Ranges": "bytes"}, files[file]


class Connection:
    """What stands between this machine and the hub."""

    error: Exception | None = None
    """Raised by every query."""


def _digest(file: str, data: bytes) -> str:
    """What the hub names a file's content by: SHA-256 in LFS, otherwise Git's hash of the blob."""
    if file.endswith(_LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(file: str, data: bytes, key: str) -> dict[str, Any]:
    """What a file in LFS has besides; the API of information and that of trees call the hash differently."""
    found = {"lfs": {key: _digest(file, data), "size": len(data), "pointerSize": 134}}
    return found if file.endswith(_LARGE) else {}


def _info(name: str, commit: str, repository: Repository, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for file, data in repository.commits[commit].items():
        entry: dict[str, Any] = {"rfilename": file}
        if blobs:
            entry |= {"size": len(data), "blobId": _digest(file, data)} | _lfs(file, data, "sha256")
        siblings.append(entry)
    found = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "cardData": repository.card}
    told = {"pipeline_tag": repository.pipeline, "gguf": repository.gguf}
    return found | {key: value for key, value in told.items() if value}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": file, "size": len(data), "oid": _digest(file, data)} | _lfs(file, data, "oid")
        for file, data in files.items()
    ]
