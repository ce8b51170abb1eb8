"""A Hugging Face hub on this machine: one file with its digest in a redirect, or a repository of several."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers for the file at `COMMIT`; `requests` lists what was asked."""

    content = b""
    digest = ""
    status = 302
    cut_at: int | None = None
    requests: list[str]

    def do_HEAD(self) -> None:
        self.requests.append(f"{self.command} {self.path}" + (" with a token" if self.headers["Authorization"] else ""))
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.path.startswith("/cdn/"):
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(self.content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        elif self.status != 302 or "/resolve/" not in self.path:
            self.send_response(self.status if self.status != 302 else 404)
            self.send_header("Content-Length", "0")
        else:
            self.send_response(302)
            self.send_header("X-Linked-ETag", f'"{self.digest}"')
            self.send_header("X-Linked-Size", str(len(self.content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Xet-Hash", "a" * 64)  # the client's other way, which asks for more than the file
            self.send_header("Link", f'<{self.address}/api/xet-read-token>; rel="xet-auth"')
            # Another host, as the hub's storage is: the client follows redirects on the same one.
            self.send_header("Location", f"{self.address.replace('127.0.0.1', 'localhost')}/cdn/blob")
            self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path.startswith("/cdn/"):
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
            end, type(self).cut_at = self.cut_at, None
            self.wfile.write(self.content[start:end])
            self.close_connection = end is not None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving_hub(content: bytes) -> Iterator[tuple[type[FakeHub], str]]:
    """A hub that serves `content` under its right digest, and its address."""
    handler = type("Hub", (FakeHub,), {"content": content, "requests": []})
    handler.digest = hashlib.sha256(content).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield handler, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class FakeRepository(http.server.BaseHTTPRequestHandler):
    """A repository of several files at one commit, which the branch main names; `requests` lists what was asked."""

    files: dict[str, bytes]
    requests: list[str]
    commit = COMMIT
    status = 200
    """Other statuses: the answer to everything."""
    page: bytes | None = None
    """A page of HTML, instead of every answer: a proxy's login."""
    error_code = ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.requests.append(f"{self.command} {path}")
        if self.page is not None:
            self.answer(200, self.page, {"Content-Type": "text/html"})
        elif self.status != 200:
            self.answer(self.status, b"", {"X-Error-Code": self.error_code})
        elif path.startswith("/api/models/"):
            assert "blobs=" in query, query
            self.listing(path)
        else:
            self.file(path)

    def listing(self, path: str) -> None:
        if not path.startswith("/api/models/org/name/"):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.rpartition("/")[2] not in ("main", self.commit):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [entry(name, content) for name, content in self.files.items()]
            self.answer(200, json.dumps({"id": "org/name", "sha": self.commit, "siblings": siblings}).encode(), {})

    def file(self, path: str) -> None:
        name = path.removeprefix("/org/name/resolve/").partition("/")[2]
        if name not in self.files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        facts = entry(name, self.files[name])
        digest = facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]
        self.answer(200, self.files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": self.commit})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def entry(name: str, content: bytes) -> dict[str, Any]:
    """What the hub lists of a file: git's id, and the sha256 of a large one."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    facts: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
    if name.endswith((".safetensors", ".bin", ".pth")):
        facts["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return facts


@contextlib.contextmanager
def serving_repository(files: dict[str, bytes]) -> Iterator[tuple[type[FakeRepository], str]]:
    """A hub with the repository `org/name`, and its address."""
    handler = type("Hub", (FakeRepository,), {"files": files, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield handler, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
