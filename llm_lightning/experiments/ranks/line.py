"""Connections between the first rank of a run and each other one, for short messages beside PyTorch's own.

Plain sockets and a thread of their own: PyTorch's store is blocked while a rank waits in it, and hangs with the first
one. A message is one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TICK_SECONDS = 0.5
BEAT_SECONDS = 2.0
ASLEEP_SECONDS = 3.0
"""A thread that comes this late was stopped itself, and its whole process with it."""
MEET_SECONDS = 30.0
"""Seconds for the other ranks to connect to the first."""
SEND_SECONDS = 1.0
"""Seconds that a message may wait for a rank that reads nothing."""
MOST_BYTES = 4_000_000
"""Of one message: the stacks of a process."""

Message = dict[str, Any]


@dataclass(eq=False)
class Peer:
    """Another rank, at the other end of a connection."""

    rank: int
    connection: socket.socket
    facts: Mapping[str, Any]
    """What it said of itself: `pid`, `host`, `started`, `elastic`."""
    heard: float = field(default_factory=time.monotonic)
    """When something came from it, on this process's clock."""
    has_left: bool = False
    """Whether it said that it ends as it should."""
    received: bytearray = field(default_factory=bytearray)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, **message: Any) -> None:
        """Send a message, unless the rank has gone."""
        with contextlib.suppress(OSError), self.sending:
            _send(self.connection, message)

    def messages(self) -> list[Message]:
        """The messages that have come. Raises EOFError at the end of the connection."""
        try:
            got = self.connection.recv(65536)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            got = b""
        if not got or len(self.received) > MOST_BYTES:
            raise EOFError
        self.heard = time.monotonic()
        *lines, rest = bytes(self.received + got).split(b"\n")
        self.received[:] = rest
        return [json.loads(line) for line in lines]


class Line:
    """The connections of this rank, and the thread that reads them.

    Args:
        peers: the others, for the first rank; for any other, the first.
        on_message: called with the peer and its message.
        on_end: called with a peer whose connection has ended.
        on_tick: called twice a second.
    """

    def __init__(
        self,
        peers: list[Peer],
        *,
        on_message: Callable[[Peer, Message], None],
        on_end: Callable[[Peer], None],
        on_tick: Callable[[], None],
    ) -> None:
        self.peers = peers
        self._on_message, self._on_end, self._on_tick = on_message, on_end, on_tick
        self._last_beat = 0.0
        self._closed = threading.Event()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._forget)  # or the death of this process would not end them

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="line", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send a message to every peer."""
        for peer in list(self.peers):
            peer.send(**message)

    def close(self) -> None:
        """Say that this process ends as it should."""
        self._closed.set()
        self.send(kind="leaves")

    def _forget(self) -> None:
        for peer in self.peers:
            peer.connection.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            last = time.monotonic()
            while not self._closed.is_set():
                for key, _ in selector.select(TICK_SECONDS):
                    self._read(selector, key.data)
                now = time.monotonic()
                if now - last > ASLEEP_SECONDS:
                    for peer in self.peers:
                        peer.heard = now
                last = now
                self._beat(now)
                self._on_tick()

    def _read(self, selector: selectors.BaseSelector, peer: Peer) -> None:
        try:
            for message in peer.messages():
                if message["kind"] == "leaves":
                    peer.has_left = True
                elif message["kind"] != "beat":
                    self._on_message(peer, message)
        except (EOFError, ValueError):
            selector.unregister(peer.connection)
            self.peers.remove(peer)
            self._on_end(peer)

    def _beat(self, now: float) -> None:
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            self.send(kind="beat")


# --- meeting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Where the first rank waits for the others, and the word that they must know."""

    host: str
    port: int
    word: str


class Meeting:
    """The first rank's side of the meeting.

    Args:
        host: how the other ranks reach this machine.
    """

    def __init__(self, host: str) -> None:
        here = host if host in ("127.0.0.1", "localhost") else ""  # a name may mean another interface here
        self._socket = socket.create_server((here, 0), backlog=1024)
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_hex(16))

    def peers(self, number: int) -> list[Peer]:
        """Wait for the other ranks; those that do not come in time are missing."""
        found: list[Peer] = []
        deadline = time.monotonic() + MEET_SECONDS
        with self._socket:
            while len(found) < number and (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                with contextlib.suppress(OSError, ValueError, KeyError):
                    connection, _ = self._socket.accept()
                    hello = _receive(connection)
                    if not secrets.compare_digest(str(hello["word"]), self.address.word):
                        connection.close()
                        continue
                    found.append(Peer(int(hello["rank"]), _ready(connection), hello["facts"]))
        return sorted(found, key=lambda peer: peer.rank)


def met(address: Address, rank: int, facts: Mapping[str, Any], of_first: Mapping[str, Any]) -> Peer:
    """The first rank, connected.

    Args:
        rank: of this process.
        facts: about this process.
        of_first: about the first rank.

    Raises:
        OSError: if it cannot be reached.
    """
    connection = socket.create_connection((address.host, address.port), timeout=MEET_SECONDS)
    _send(connection, {"word": address.word, "rank": rank, "facts": facts})
    return Peer(0, _ready(connection), of_first)


def _ready(connection: socket.socket) -> socket.socket:
    connection.settimeout(SEND_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> Message:
    """The first line of a new connection."""
    connection.settimeout(SEND_SECONDS)
    with connection.makefile("rb") as lines:
        message: Message = json.loads(lines.readline(65536))
    return message
