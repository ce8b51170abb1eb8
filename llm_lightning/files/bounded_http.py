"""HTTP in bounded time and memory, whatever the server does. Standard library only.

A socket timeout limits one read, so a server that sends a byte now and then can hold its client forever, and nothing
limits the size of a response. Here one reader receives every byte of a response, headers included, and checks time and
size against an `Allowance`.
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
"""Limit of a response body in `exchange`; a language model's answer has about a thousandth of it."""
HEADER_BYTES = 1 << 17
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class NoConnectionError(ConnectionError):
    """No server accepts connections at the address."""


class TooLongError(ConnectionError):
    """A response exceeds its size limit."""


class Allowance(Protocol):
    """The time and size that a response may still use."""

    def seconds(self) -> float:
        """Timeout of the next read; raises TimeoutError if no time is left."""

    def take(self, n_bytes: int) -> None:
        """Count the bytes of a read; raises OSError above the limit."""


class Once:
    """A total time, counted from now, and a limit of bytes in addition to the headers."""

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
    """A minimum rate, `least_bytes` in every `seconds`, and a limit of bytes in addition to the headers."""

    def __init__(self, seconds: float, least_bytes: float, most_bytes: int) -> None:
        self._seconds, self._least, self._bytes = seconds, least_bytes, _Bytes(most_bytes)
        self._begin()

    def seconds(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            if self._received < self._least:
                raise TimeoutError(f"timed out: {self._received:,} bytes in {self._seconds:g} seconds")
            self._begin()
            return self._seconds
        return left

    def take(self, n_bytes: int) -> None:
        self._received += n_bytes
        self._bytes.take(n_bytes)

    def _begin(self) -> None:
        self._end, self._received = time.monotonic() + self._seconds, 0


class _Bytes:
    def __init__(self, most: int) -> None:
        self._most, self._received = most, 0

    def take(self, n_bytes: int) -> None:
        self._received += n_bytes
        if self._received > self._most + HEADER_BYTES:
            raise _too_long(self._most)


def _too_long(most: int) -> TooLongError:
    return TooLongError(f"the answer has more than {most:,} bytes")


class Reply(NamedTuple):
    """A complete response."""

    status: int
    reason: str
    headers: HTTPMessage
    body: bytes


def exchange(
    url: str, *, seconds: float, connect_seconds: float, body: bytes | None = None, headers: Mapping[str, str] = {}
) -> Reply:
    """Send one request, POST if it has a body, and read the whole response; redirects are not followed.

    Proxies come from the environment, except for requests to this machine, which proxies cannot reach.

    Args:
        seconds: total time, from connecting to the last byte; the DNS lookup has the system's own limit.
        connect_seconds: the part of it for connecting.

    Raises:
        NoConnectionError: if no server accepts connections there.
        TimeoutError: if the response is not complete in time.
        TooLongError: if the body exceeds `MOST_BYTES`.
        OSError, http.client.HTTPException: if the connection breaks, or the response is not HTTP.
    """
    allowance = Once(seconds, MOST_BYTES)
    # Uncompressed: 4 MiB of gzip can hold 4 GiB of text.
    request = urllib.request.Request(url, data=body, headers={**headers, "Accept-Encoding": "identity"})
    direct = urlsplit(url).hostname in LOCAL_HOSTS
    opened = opener(allowance, [] if direct else [urllib.request.ProxyHandler()])
    try:
        with opened.open(request, timeout=min(connect_seconds, allowance.seconds())) as response:
            content = response.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise _too_long(MOST_BYTES)
            if response.length:  # read(n) accepts a response that ends too early
                raise IncompleteRead(content, response.length)
            return Reply(response.status, response.reason, response.headers, content)
    except urllib.error.URLError as error:
        if isinstance(error.reason, OSError):
            raise error.reason from None
        raise


def opener(allowance: Allowance, handlers: list[urllib.request.BaseHandler]) -> urllib.request.OpenerDirector:
    """An opener for http and https with only these `handlers`; its responses stay within the allowance."""
    opened = urllib.request.OpenerDirector()
    for handler in (_HTTPHandler(allowance), _HTTPSHandler(allowance), *handlers):
        opened.add_handler(handler)
    return opened


class _Reader(io.RawIOBase):
    """Reads a socket while the allowance lasts."""

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
        self.sock.settimeout(self._allowance.seconds())  # limits sending as a whole, not each packet


class _SecureConnection(_Connection, HTTPSConnection):
    """`_Connection.connect` wraps that of `HTTPSConnection`."""


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
