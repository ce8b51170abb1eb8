"""Pinned downloads against a server on 127.0.0.1 that does everything wrong that servers do."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from judge_server import HUGE_WAYS, SLOW_WAYS, floods, sends

from llm_lightning.files import download as module
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.bounded_http import HEADER_BYTES
from llm_lightning.files.download import DownloadError, Pinned, download

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


ended = threading.Event()
REDIRECT = "HTTP/1.1 302 Found\r\nLocation: /good\r\n"
WAYS = {
    **SLOW_WAYS,
    **HUGE_WAYS,
    "redirect with a page of 2 GB": floods(f"{REDIRECT}Content-Length: {2 << 30}\r\n\r\n", b" "),
    "redirect with a page without end": floods(f"{REDIRECT}\r\n", b" "),
    "redirect to itself": sends("HTTP/1.1 302 Found\r\nLocation: /redirect%20to%20itself\r\n\r\n"),
    "redirect without end": sends("HTTP/1.1 302 Found\r\nLocation: ?x\r\n\r\n"),
    "100 Continue without end": floods("", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "odd length": sends("HTTP/1.1 200 OK\r\nContent-Length: \u00b2\r\n\r\n".encode("latin-1"), CONTENT),
    "length of 5000 digits": sends(f"HTTP/1.1 200 OK\r\nContent-Length: {'9' * 5000}\r\n\r\n"),
}
GOOD_WAYS = {"redirect with a page of 2 GB", "redirect with a page without end", "odd length"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, spoiled in the way that the path names."""

    requests: list[tuple[str, str]] = []  # noqa: RUF012 (shared by all requests on purpose)

    def do_GET(self) -> None:
        kind, wanted = unquote(self.path.partition("?")[0]).strip("/"), self.headers.get("Range", "")
        Handler.requests.append((kind, wanted))
        if kind in WAYS:
            with contextlib.suppress(OSError):  # the client has read enough
                WAYS[kind](self.connection, ended)
            self.close_connection = True
            return None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        first = sum(seen == kind for seen, _ in Handler.requests) == 1
        if kind.startswith("to-"):
            return self.reply(302, b"", Location={"to-file": "file:///etc/hostname", "to-good": "/good"}[kind])
        if kind == "404":
            return self.reply(404, b"<html>not here</html>")
        if kind == "html":
            return self.reply(200, b"<html>log in first</html>", Content_Type="text/html")
        if kind == "busy" and first:
            return self.reply(503, b"")
        if kind == "wrong":
            return self.reply(200, bytes(len(CONTENT)))
        if kind == "norange":
            return self.reply(200, CONTENT)
        if kind == "416" and wanted:
            return self.reply(416, b"")
        if kind == "shifted" and wanted:  # a range that is not the one asked for, and says so
            return self.reply(206, CONTENT[start + 7 :], Content_Range=f"bytes {start + 7}-/*")
        if kind == "lying" and wanted:  # ... and does not say so
            return self.reply(206, CONTENT[:-start], Content_Range=f"bytes {start}-/*")
        extra = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if wanted else {}
        body = CONTENT[start:]
        if kind == "cut" and first:
            return self.reply(206 if wanted else 200, body[:100_000], length=len(body), **extra)
        return self.reply(206 if wanted else 200, body, pause=0.02 * (kind == "slow"), **extra)

    def reply(self, code: int, body: bytes, length: int | None = None, pause: float = 0, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        for start in range(0, len(body), 10_000):
            try:
                self.wfile.write(body[start : start + 10_000])
            except ConnectionError:
                return
            time.sleep(pause)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(module, "BLOCK", 16_384)
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    Handler.requests.clear()


def pinned(url: str, n_bytes: int | None = len(CONTENT)) -> Pinned:
    return Pinned(url, SHA256, n_bytes, "file.bin")


@pytest.mark.parametrize("kind", ["good", "to-good", "busy", "cut", "slow"])
def test_brings_the_pinned_bytes(server: str, tmp_path: Path, kind: str) -> None:
    path = download(pinned(f"{server}/{kind}"), tmp_path)
    assert path == tmp_path / "file.bin"
    assert path.read_bytes() == CONTENT
    assert not list(tmp_path.glob("*.part"))


def test_default_folder_is_in_the_cache(server: str) -> None:
    assert download(pinned(f"{server}/good")) == cache_dir() / "downloads" / "file.bin"


@pytest.mark.parametrize("kind", ["good", "norange", "416", "shifted", "lying"])
def test_resumes_and_survives_what_servers_make_of_ranges(server: str, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:120_000])
    assert download(pinned(f"{server}/{kind}"), tmp_path).read_bytes() == CONTENT
    assert Handler.requests[0] == (kind, "bytes=120000-")
    assert len(Handler.requests) == (1 if kind in ("good", "norange") else 2)


def test_a_cut_connection_is_resumed_where_it_ended(server: str, tmp_path: Path) -> None:
    download(pinned(f"{server}/cut"), tmp_path)
    assert Handler.requests == [("cut", ""), ("cut", "bytes=100000-")]


@pytest.mark.parametrize(
    "part", [CONTENT[:-1] + b"?", CONTENT + b"more", bytes(200_000)], ids=["flipped", "long", "foreign"]
)
@pytest.mark.parametrize("n_bytes", [len(CONTENT), None])
def test_a_damaged_part_is_repaired(server: str, tmp_path: Path, part: bytes, n_bytes: int | None) -> None:
    (tmp_path / "file.bin.part").write_bytes(part)
    assert download(pinned(f"{server}/416", n_bytes), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("404", "404 Not Found"),
        ("html", "offers 25 bytes of text/html, expected 300000"),
        ("wrong", f"have sha256 {hashlib.sha256(bytes(len(CONTENT))).hexdigest()}, expected {SHA256}"),
        ("to-file", "Redirection to url 'file:///etc/hostname' is not allowed"),
    ],
)
def test_a_wrong_answer_leaves_no_file_and_says_why(server: str, tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(DownloadError) as error:
        download(pinned(f"{server}/{kind}"), tmp_path)
    assert reason in str(error.value)
    assert f"{server}/{kind}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "file.bin").exists()
    assert len(Handler.requests) == 1  # nothing that another attempt could change


@pytest.mark.slow
def test_no_server_holds_or_fills_us(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.3 refused a server that answers, once, where other work kept both cores busy.
    monkeypatch.setattr(module, "TIMEOUT", 1.0)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    monkeypatch.setattr(module, "LARGEST", 1 << 20)

    def brought(way: tuple[str, int | None]) -> str:
        name, n_bytes = way
        folder = tmp_path / f"{name} {n_bytes}"
        try:
            found = "brought" if download(pinned(f"{server}/{quote(name)}", n_bytes), folder).is_file() else "no file"
        except DownloadError as error:
            found = f"two lines: {error}" if "\n" in str(error) else "refused"
        held = sum(file.stat().st_size for file in folder.iterdir())
        return found if held <= (1 << 20) + HEADER_BYTES + module.BLOCK else f"{held} bytes on disk"

    ways = [*((name, None) for name in WAYS), *((name, len(CONTENT)) for name in HUGE_WAYS)]
    started = time.monotonic()
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            found = dict(zip(ways, pool.map(brought, ways), strict=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        ended.set()
    wrong = {way: one for way, one in found.items() if one != ("brought" if way[0] in GOOD_WAYS else "refused")}
    assert not wrong
    assert peak < 40 << 20
    assert time.monotonic() - started < 60


def test_the_error_tells_where_to_put_a_copy(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"put a copy with sha256 {SHA256} at {tmp_path}/file.bin"):
        download(pinned(f"{server}/404"), tmp_path)
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert download(pinned(f"{server}/404"), tmp_path).read_bytes() == CONTENT


def test_a_page_of_unknown_length_is_refused_by_its_digest(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the 25 bytes received have sha256"):
        download(pinned(f"{server}/html", n_bytes=None), tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        download(pinned(url), tmp_path)


def test_no_server_is_one_clear_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(DownloadError, match="Connection refused"):
        download(pinned(url), tmp_path)


def test_a_verified_copy_needs_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a connection was opened")

    (tmp_path / "file.bin").write_bytes(CONTENT)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert download(pinned("https://example.invalid/file.bin"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("n_bytes", [0, 1000, 299_999])
def test_a_damaged_copy_is_fetched_anew(server: str, tmp_path: Path, n_bytes: int) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT[:n_bytes])
    assert download(pinned(f"{server}/good"), tmp_path).read_bytes() == CONTENT


def _download_in_child(url: str, folder: Path) -> None:
    assert download(pinned(url), folder).read_bytes() == CONTENT


@pytest.mark.slow
def test_eight_processes_download_once(server: str, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_download_in_child, args=(f"{server}/slow", tmp_path)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    assert Handler.requests == [("slow", "")]


@pytest.mark.slow
def test_killed_again_and_again_it_resumes(server: str, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from llm_lightning.files.bounded_http import HEADER_BYTES
from llm_lightning.files import download as module
module.BLOCK = 16_384
print("ready", flush=True)
module.download(module.Pinned({server + "/slow"!r}, {SHA256!r}, {len(CONTENT)}, "file.bin"), Path({str(tmp_path)!r}))
"""
    draw = random.Random(1)
    for number in range(6):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if number == 0:  # on a busy machine, the others may be killed before they have received anything
            while not any(file.stat().st_size for file in tmp_path.iterdir()):
                time.sleep(0.01)
        else:
            time.sleep(draw.uniform(0.01, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        whole = tmp_path / "file.bin"
        assert not whole.exists() or whole.read_bytes() == CONTENT
    assert download(pinned(f"{server}/slow"), tmp_path).read_bytes() == CONTENT
    assert any(wanted for _, wanted in Handler.requests)


def test_full_disk_is_reported_and_the_part_is_kept(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DownloadError, match=r"file\.bin\.part cannot be written \(File too large\)"):
            download(pinned(f"{server}/good"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert download(pinned(f"{server}/good"), tmp_path).read_bytes() == CONTENT
