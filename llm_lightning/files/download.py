"""Pinned downloads: a file is there whole and right, or it is not there.

The sha256 of every file stands in our source, so it does not matter what a server, a proxy or a broken disk
sends: the file appears under its name only after its digest is right. What has arrived before a failure is kept
as `<name>.part` and resumed. A file that is already there is verified without opening a connection.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from llm_lightning.files.atomic import write_atomically
from llm_lightning.files.bounded_http import Pace, opener
from llm_lightning.nearest import did_you_mean

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_DELAY = 1.0  # seconds before the second attempt; doubles from there
TIMEOUT = 30.0  # seconds without a byte, or at less than the next
LEAST_RATE = 1000.0  # bytes per second: a server that sends one now and then would hold us for ever
LARGEST = 16 << 30  # bytes of a file whose size is not pinned; the largest weights of GPT-2 have 6.4 GB
BLOCK = 1 << 18
SHA256 = "[0-9a-f]{64}"

# Worth another attempt. Any other OSError (full disk, no permission) is not the network's and goes straight up.
_NETWORK_ERRORS = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError
)  # fmt: skip


class DownloadError(OSError):
    """A pinned file could not be had; the message names the address, the reason and the remedy."""


@dataclass(frozen=True)
class Pinned:
    """One file on the web, fixed by its content."""

    url: str
    sha256: str
    n_bytes: int | None
    filename: str
    """Name under which it is kept; unique within its folder."""
    member: str | None = None
    """The file inside a zip archive that is meant; `sha256` is then its digest, whatever archive it comes in."""
    member_bytes: int = 0
    """Its size, beyond which nothing is unpacked."""


def cache_dir() -> Path:
    """Return the one folder for everything that can be fetched or computed again."""
    return Path(os.environ.get("LLM_LIGHTNING_CACHE") or Path.home() / ".cache" / "llm_lightning").expanduser()


def check_name(name: str | None, named: Collection[str]) -> None:
    """Raise ValueError for a named data set that there is not."""
    if name is not None and name not in named:
        hint = did_you_mean(name, named)
        raise ValueError(f"data.name={name} is unknown: {hint}use {', '.join(named)}, or null with data.path=FILE")


def file_of(named: Path | Pinned) -> Path:
    """The file of a named data set, downloaded if need be."""
    return named if isinstance(named, Path) else download(named)


def download(pinned: Pinned, folder: Path | None = None) -> Path:
    """Return the path of the verified file, fetching it only if no verified copy is there.

    Safe to call from any number of processes at once: one fetches, the others wait.

    Raises:
        DownloadError: no attempt brought the pinned bytes.
    """
    target = (folder or cache_dir() / "downloads") / pinned.filename
    if _is_right(target, pinned):
        return target
    with locked(target):
        if not _is_right(target, pinned):
            part = target.with_name(target.name + ".part")
            try:
                _fetch(pinned, part)
                commit(_unpacked(part, pinned) if pinned.member else part, target)
                part.unlink(missing_ok=True)
            except DownloadError:
                raise
            except OSError as error:  # the disk's, not the network's
                reason = f"{part} cannot be written ({error.strerror or error}); make room there, or set "
                raise _failure(pinned, part, f"{reason}LLM_LIGHTNING_CACHE to another folder") from error
    return target


def hub_file(
    repository: str, revision: str, path: str, filename: str, sha256: str | None = None, n_bytes: int | None = None
) -> Pinned:
    """Pin one file of a Hugging Face repository; without `sha256`, to the digest the hub states for that revision.

    The endpoint is `$HF_ENDPOINT` or https://huggingface.co. A digest once stated is remembered in the cache, so
    that later calls need no connection and a hub that changes its mind is noticed.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repository}/resolve/{revision}/{path}"
    if sha256 is None:
        sha256 = _remembered_digest(f"{repository}/{revision}/{path}", url)
    return Pinned(url, sha256, n_bytes, filename)


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` (`<target>.lock`); a process that dies releases it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that is making %s", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def commit(finished: Path, target: Path) -> None:
    """Rename a flushed file or folder into place, and make the rename itself durable."""
    finished.replace(target)
    if os.name == "posix":  # Windows has no way to flush a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _is_right(target: Path, pinned: Pinned) -> bool:
    if not target.exists():
        return False
    actual = sha256_of(target)
    if actual != pinned.sha256:
        log.warning("%s has sha256 %s, expected %s: fetching it anew", target, actual, pinned.sha256)
    return actual == pinned.sha256


def _fetch(pinned: Pinned, part: Path) -> None:
    """Bring `part` to the pinned content over as many connections as it takes."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
        resuming = part.exists()
        try:
            _receive(pinned, part)
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {' '.join(error.reason.split())[:100]}"
            error.close()
            if error.code == 416:  # the range lies behind the end: what we hold is not a beginning of the file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
        except _NETWORK_ERRORS as error:
            reason = str(getattr(error, "reason", error))[:200] or type(error).__name__
        else:
            actual = _digest_of_member(part, pinned) if pinned.member else sha256_of(part)
            if actual == pinned.sha256:
                return
            reason = f"the {part.stat().st_size} bytes received have sha256 {actual}, expected {pinned.sha256}"
            part.unlink()
            if not resuming:  # all of it came from this server: asking again would bring the same
                break
    raise _failure(pinned, part, reason)


def _member_bytes(archive: Path, pinned: Pinned) -> bytes:
    assert pinned.member is not None
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(pinned.member) as member:
            return member.read(pinned.member_bytes + 1)  # never more, whatever the archive says
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
        return repr(error).encode()  # has no right digest either


def _digest_of_member(archive: Path, pinned: Pinned) -> str:
    return hashlib.sha256(_member_bytes(archive, pinned)).hexdigest()


def _unpacked(archive: Path, pinned: Pinned) -> Path:
    """The member beside the archive, flushed."""
    unpacked = archive.with_suffix(".tmp")
    with unpacked.open("wb") as file:
        file.write(_member_bytes(archive, pinned))
        file.flush()
        os.fsync(file.fileno())
    return unpacked


def _failure(pinned: Pinned, part: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"cannot download {pinned.url}: {reason}; try again later (what has arrived is kept and resumed), "
        f"or put a copy with sha256 {pinned.sha256} at {part.with_name(pinned.filename)}"
    )


def _receive(pinned: Pinned, part: Path) -> None:
    """Append to `part` what one connection gives."""
    held = part.stat().st_size if part.exists() else 0
    if held and held == pinned.n_bytes:
        return
    most = LARGEST if pinned.n_bytes is None else pinned.n_bytes
    if held > most:  # no beginning of the file
        part.unlink()
        held = 0
    headers = {"User-Agent": "llm-lightning", "Accept-Encoding": "identity"}
    if held:
        headers["Range"] = f"bytes={held}-"
    with _open(urllib.request.Request(pinned.url, headers=headers), most) as response:
        start = _first_byte(response, held, part)
        length = response.headers.get("Content-Length", "")
        end = start + int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        if end is not None and (end > LARGEST if pinned.n_bytes is None else end != pinned.n_bytes):
            kind = response.headers.get_content_type()
            expected = f"at most {LARGEST}" if pinned.n_bytes is None else pinned.n_bytes
            raise _failure(pinned, part, f"the server offers {end} bytes of {kind}, expected {expected}")
        _append(response, part, start, end if end is not None else pinned.n_bytes)


def _first_byte(response: http.client.HTTPResponse, held: int, part: Path) -> int:
    """Return the position in the file where the response starts: `held`, or 0 if the range was ignored."""
    if response.status != 206:
        return 0
    stated = response.headers.get("Content-Range", "")
    if not stated.startswith(f"bytes {held}-"):
        part.unlink(missing_ok=True)
        raise ConnectionError(f"asked for bytes from {held}, the server sends '{stated}'")
    return held


def _append(response: http.client.HTTPResponse, part: Path, start: int, end: int | None) -> None:
    bar = tqdm(desc=part.stem, initial=start, total=end, unit="B", unit_scale=True, disable=None)
    with part.open("r+b" if start else "wb") as file, bar:
        file.seek(start)
        received = start
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))
            received += len(block)
            if end is not None and received > end:
                break  # more than there is: the digest will refuse it, and no disk is filled
        file.flush()
        os.fsync(file.fileno())
    if end is not None and received < end:
        raise ConnectionError(f"the connection ended after {received} of {end} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects only to https, or from http to http: never to a file, never down to plain text."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = {"https"} if req.type == "https" else {"http", "https"}
        if urlsplit(newurl).scheme not in allowed:
            raise DownloadError(f"cannot download {req.full_url}: it redirects to {newurl}, which is refused")
        fp.close()  # or the page that comes with it would be read whole, whatever its size
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leave a redirect as it is: the hub states a file's digest in it, not behind it."""

    def redirect_request(self, *_: object) -> None:
        return None


def _open(
    request: urllib.request.Request, most_bytes: int, redirects: urllib.request.HTTPRedirectHandler | None = None
) -> http.client.HTTPResponse:
    """Open an http or https address; handlers for other schemes are not even installed."""
    if urlsplit(request.full_url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {request.full_url}: only http and https addresses are fetched")
    handlers = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        redirects or _Redirects(),
    ]
    return opener(Pace(TIMEOUT, TIMEOUT * LEAST_RATE, most_bytes), handlers).open(request, timeout=TIMEOUT)


def _remembered_digest(name: str, url: str) -> str:
    record = cache_dir() / "digests" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"
    with locked(record):
        if (kept := _kept_digest(record)) is not None:
            return kept
        digest = _stated_digest(url)
        write_atomically(record, json.dumps({"file": name, "sha256": digest}))
    return digest


def _kept_digest(record: Path) -> str | None:
    """What is remembered; None if nothing is, or it is damaged."""
    try:
        kept = json.loads(record.read_bytes())["sha256"]
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return kept if isinstance(kept, str) and re.fullmatch(SHA256, kept) else None


def _stated_digest(url: str) -> str:
    """Ask the hub for the sha256 of a large file: the `X-Linked-ETag` of its answer."""
    request = urllib.request.Request(url, headers={"User-Agent": "llm-lightning"}, method="HEAD")
    headers: Message
    try:
        with _open(request, 0, _NoRedirects()) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
        if error.code >= 400:
            raise DownloadError(f"cannot ask {url} for its digest: {error.code} {error.reason}") from error
    except _NETWORK_ERRORS as error:
        raise DownloadError(f"cannot ask {url} for its digest: {getattr(error, 'reason', error)}") from error
    digest = headers.get("X-Linked-ETag", "").strip('"')
    if not re.fullmatch(SHA256, digest):
        raise DownloadError(f"cannot verify {url}: the hub states no sha256 for it (got {digest!r})")
    return digest
