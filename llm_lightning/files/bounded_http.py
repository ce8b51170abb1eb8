"""HTTP in bounded time and memory, whatever the server does. Standard library only.

The time limits of sockets are for one read, so a server that sends a byte now and then holds its client for ever; and
nothing limits how much is read. Here every byte of an answer, its headers included, passes through one reader, which
counts bytes and time against what its `Allowance` leaves.
"""

from __future__ import annotations

import io
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import partial
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

MOST_BYTES = 4 << 20
"""Of one answer of `exchange`: an answer of a language model has a thousandth of it."""
HEADER_BYTES = 1 << 17
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class NoConnectionError(ConnectionError):
    """Nothing accepts connections at the address."""


class TooLongError(ConnectionError):
    """An answer has more bytes than are read."""


class Allowance(Protocol):
    """What an answer may still take."""

    def seconds(self) -> float:
        """How long the next read may wait; raises TimeoutError if there is no time left."""

    def take(self, n_bytes: int) -> None:
        """Count what a read has brought; raises OSError if it is too much."""


class Once:
    """So many seconds from now, and so many bytes besides the headers."""

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self._deadline, self._bytes = time.monotonic() + seconds, _Bytes(most_bytes)

    def seconds(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def take(self, n_bytes: int) -> None:
        self._bytes.take(n_bytes)


class Pace:
    """As long as so many bytes besides the headers take, of which at least `least_bytes` come in every `seconds`."""

    def __init__(self, seconds: float, least_bytes: float, most_bytes: int) -> None:
        self._seconds, self._least, self._bytes = seconds, least_bytes, _Bytes(most_bytes)
        self._begin()

    def seconds(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            if self._found < self._least:
                raise TimeoutError(f"timed out: {self._found:,} bytes in {self._seconds:g} seconds")
            self._begin()
            return self._seconds
        return left

    def take(self, n_bytes: int) -> None:
        self._found += n_bytes
        self._bytes.take(n_bytes)

    def _begin(self) -> None:
        self._end, self._found = time.monotonic() + self._seconds, 0


class _Bytes:
    def __init__(self, most: int) -> None:
        self._most, self._found = most, 0

    def take(self, n_bytes: int) -> None:
        self._found += n_bytes
        if self._found > self._most + HEADER_BYTES:
            raise _too_long(self._most)


def _too_long(most: int) -> TooLongError:
    return TooLongError(f"the answer has more than {most:,} bytes")


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    reason: str
    headers: HTTPMessage
    body: bytes


def exchange(
    url: str, *, seconds: float, connect_seconds: float, body: bytes | None = None, headers: Mapping[str, str] = {}
) -> Reply:
    """Send one request, POST if there is a body, and read its whole answer; redirects are not followed.

    Proxies are taken from the environment, except for this machine, which they cannot reach.

    Args:
        seconds: for all of it, from connecting to the last byte; looking up the host's name is left to the system.
        connect_seconds: of it, for connecting.

    Raises:
        NoConnectionError: if nothing accepts connections there.
        TimeoutError: if the answer is not whole in time.
        TooLongError: if it has more than `MOST_BYTES`.
        OSError, http.client.HTTPException: if the connection breaks, or what comes is not HTTP.
    """
    allowance = Once(seconds, MOST_BYTES)
    # Not compressed, for 4 MiB of gzip may be 4 GiB of text.
    request = urllib.request.Request(url, data=body, headers={**headers, "Accept-Encoding": "identity"})
    direct = urlsplit(url).hostname in LOCAL_HOSTS
    opened = opener(allowance, [] if direct else [urllib.request.ProxyHandler()])
    try:
        with opened.open(request, timeout=min(connect_seconds, allowance.seconds())) as response:
            found = response.read(MOST_BYTES + 1)
            if len(found) > MOST_BYTES:
                raise _too_long(MOST_BYTES)
            if response.length:  # read(n) does not mind an end that comes too early
                raise IncompleteRead(found, response.length)
            return Reply(response.status, response.reason, response.headers, found)
    except urllib.error.URLError as error:
        if isinstance(error.reason, OSError):
            raise error.reason from None
        raise


def opener(allowance: Allowance, handlers: list[urllib.request.BaseHandler]) -> urllib.request.OpenerDirector:
    """An opener for http and https, with nothing else but `handlers`, whose answers keep to the allowance."""
    opened = urllib.request.OpenerDirector()
    for handler in (_HTTPHandler(allowance), _HTTPSHandler(allowance), *handlers):
        opened.add_handler(handler)
    return opened


class _Reader(io.RawIOBase):
    """The bytes of a socket, as long as the allowance lasts."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, allowance: Allowance) -> None:
        self._raw, self._sock, self._allowance = raw, sock, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._allowance.seconds())
        n_bytes = self._raw.readinto(buffer)
        self._allowance.take(n_bytes or 0)
        return n_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, allowance: Allowance, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        raw = cast(io.BufferedReader, self.fp).detach()
        self.fp = io.BufferedReader(_Reader(raw, sock, allowance))


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, allowance: Allowance, **options: Any) -> None:
        super().__init__(*args, **options)
        self.response_class = partial(_Response, allowance=allowance)  # type: ignore[assignment]
        self._allowance = allowance

    def connect(self) -> None:
        try:
            super().connect()
        except OSError as error:
            raise NoConnectionError(str(error) or type(error).__name__) from error
        assert self.sock is not None
        self.sock.settimeout(self._allowance.seconds())  # of sending: all of it, not each packet


class _SecureConnection(_Connection, HTTPSConnection):
    """`_Connection.connect` around that of https."""


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Connection, req, allowance=self._allowance)  # type: ignore[arg-type]


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req, allowance=self._allowance)  # type: ignore[arg-type]
