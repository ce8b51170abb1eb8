"""Pinned downloads of web addresses: a file is complete and verified, or absent. `hub.py` does the same for the hub.

The sha256 of every file is in our source, so no server, proxy or disk needs trust: a file gets its name only after its
digest is verified. A failed download is kept as `<name>.part` and resumed. An existing file is verified without
opening a connection.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from tqdm import tqdm

from llm_lightning.files.atomic import cache_dir, commit, locked, sha256_of
from llm_lightning.files.bounded_http import Pace, opener
from llm_lightning.nearest import did_you_mean

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_DELAY = 1.0  # seconds before the second attempt; doubles from there
TIMEOUT = 30.0  # seconds without a byte, or below the minimum rate
LEAST_RATE = 1000.0  # bytes per second: a server that sends a byte now and then must not hold the client
LARGEST = 16 << 30  # bytes: the limit for a file whose size is not pinned
BLOCK = 1 << 18
SHA256 = "[0-9a-f]{64}"

# Worth another attempt. Any other OSError (full disk, no permission) is not a network error and is raised at once.
_NETWORK_ERRORS = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError
)  # fmt: skip


class DownloadError(OSError):
    """A pinned file could not be downloaded; the message names the address, the reason and the remedy."""


@dataclass(frozen=True)
class Pinned:
    """One file on the web, pinned by its sha256."""

    url: str
    sha256: str
    n_bytes: int | None
    filename: str
    """Its name in the cache."""
    member: str | None = None
    """A file inside a zip archive; `sha256` is then the digest of this file, not of the archive."""
    member_bytes: int = 0
    """Size of the member; no more is unpacked."""


def check_name(name: str | None, named: Collection[str]) -> None:
    """Raise ValueError for an unknown named data set."""
    if name is not None and name not in named:
        hint = did_you_mean(name, named)
        raise ValueError(f"data.name={name} is unknown: {hint}use {', '.join(named)}, or null with data.path=FILE")


def file_of(named: Path | Pinned) -> Path:
    """The file of a named data set, downloaded if it is missing."""
    return named if isinstance(named, Path) else download(named)


def download(pinned: Pinned, folder: Path | None = None) -> Path:
    """Return the path of the verified file; download it only if there is no verified copy.

    Several processes may call it at once: one downloads, the others wait.

    Raises:
        DownloadError: if no attempt delivered the pinned bytes.
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
            except OSError as error:  # from the disk, not the network
                reason = f"{part} cannot be written ({error.strerror or error}); make room there, or set "
                raise _failure(pinned, part, f"{reason}LLM_LIGHTNING_CACHE to another folder") from error
    return target


def _is_right(target: Path, pinned: Pinned) -> bool:
    if not target.exists():
        return False
    actual = sha256_of(target)
    if actual != pinned.sha256:
        log.warning("%s has sha256 %s, expected %s: downloading it again", target, actual, pinned.sha256)
    return actual == pinned.sha256


def _fetch(pinned: Pinned, part: Path) -> None:
    """Download until `part` is complete and verified, over up to `ATTEMPTS` connections."""
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
            if error.code == 416:  # the range starts past the end: `part` is not the beginning of the file
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
            if not resuming:  # all bytes came from this server: another attempt would deliver the same
                break
    raise _failure(pinned, part, reason)


def _member_bytes(archive: Path, pinned: Pinned) -> bytes:
    assert pinned.member is not None
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(pinned.member) as member:
            return member.read(pinned.member_bytes + 1)  # a limit, because the archive may state a wrong size
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
        return repr(error).encode()  # its digest is wrong, so the caller rejects it


def _digest_of_member(archive: Path, pinned: Pinned) -> str:
    return hashlib.sha256(_member_bytes(archive, pinned)).hexdigest()


def _unpacked(archive: Path, pinned: Pinned) -> Path:
    """Unpack the member beside the archive and flush it."""
    unpacked = archive.with_suffix(".tmp")
    with unpacked.open("wb") as file:
        file.write(_member_bytes(archive, pinned))
        file.flush()
        os.fsync(file.fileno())
    return unpacked


def _failure(pinned: Pinned, part: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"cannot download {pinned.url}: {reason}; try again later (the part received is kept and resumed), "
        f"or put a copy with sha256 {pinned.sha256} at {part.with_name(pinned.filename)}"
    )


def _receive(pinned: Pinned, part: Path) -> None:
    """Append the bytes of one connection to `part`."""
    held = part.stat().st_size if part.exists() else 0
    if held and held == pinned.n_bytes:
        return
    most = LARGEST if pinned.n_bytes is None else pinned.n_bytes
    if held > most:  # too long to be the beginning of the file
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
    """Offset in the file at which the response starts: `held`, or 0 if the server ignored the range."""
    if response.status != 206:
        return 0
    stated = response.headers.get("Content-Range", "")
    if not stated.startswith(f"bytes {held}-"):
        part.unlink(missing_ok=True)
        raise ConnectionError(f"requested bytes from {held}, the server sends '{stated}'")
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
                break  # too long: the digest will be wrong, and the disk must not fill up
        file.flush()
        os.fsync(file.fileno())
    if end is not None and received < end:
        raise ConnectionError(f"the connection ended after {received} of {end} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects only to https, or from http to http: never to a file, never from https to http."""

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
        fp.close()  # otherwise the whole body would be read, of any size
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request, most_bytes: int) -> http.client.HTTPResponse:
    """Open an http or https address; other schemes have no handler."""
    if urlsplit(request.full_url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {request.full_url}: only http and https addresses are fetched")
    handlers = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ]
    return opener(Pace(TIMEOUT, TIMEOUT * LEAST_RATE, most_bytes), handlers).open(request, timeout=TIMEOUT)
