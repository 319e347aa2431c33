"""A Hugging Face hub on this machine: one HTTP server that serves repositories from memory."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """`publish` repositories, point HF_ENDPOINT at `url`, and see in `downloads` which files were fetched."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.downloads: list[str] = []
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
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def publish(self, repository: str, directory: Path, extra: dict[str, bytes] | None = None) -> str:
        """Put the files of a directory up as the newest commit, whose id is returned."""
        files = {path.name: path.read_bytes() for path in directory.iterdir()} | (extra or {})
        content = "".join(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.repositories[repository] = commit, files
        return commit

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        api = path.startswith("api/models/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        headers: dict[str, str] = {}
        status, data = 200, b""
        if name not in self.repositories:
            status, headers["X-Error-Code"] = 401, "RepoNotFound"
        elif api:
            commit, files = self.repositories[name]
            answer = self._tree(files) if "/tree/" in path else self._info(name, commit, files)
            data = json.dumps(answer).encode()
            headers["Content-Type"] = "application/json"
        else:
            commit, files = self.repositories[name]
            file = path.split("/", 4)[4]
            data = files[file]
            headers |= {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if body:
                self.downloads.append(file)
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)

    @staticmethod
    def _info(name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = [{"rfilename": file} for file in files]
        return {"id": name, "modelId": name, "sha": commit, "siblings": siblings}

    @staticmethod
    def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
        ]
