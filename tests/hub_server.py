"""A Hugging Face hub on this machine: one file, its digest in a redirect, its bytes behind it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator

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
