"""Say that this process waits for the others of its run, and for how many.

PyTorch waits in silence, for 30 minutes.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from llm_lightning.experiments.ranks.launcher import Launched
from llm_lightning.terminal import say

AFTER_SECONDS, AGAIN_SECONDS = 10.0, 60.0
JOIN_SECONDS = AFTER_SECONDS / 2
"""A process that has waited for this long counts as arrived: by the first line, all that wait have told each other."""
CONNECT_SECONDS = 2.0


@contextlib.contextmanager
def announced(line: Callable[[], str], join: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Print `line()` on stderr if the block takes more than ten seconds, and again each minute; "" prints nothing.

    Args:
        join: called once, after half of that time.
    """
    over = threading.Event()

    def watch() -> None:
        if over.wait(JOIN_SECONDS):
            return
        join()
        seconds = AFTER_SECONDS - JOIN_SECONDS
        while not over.wait(seconds):
            text, seconds = line(), AGAIN_SECONDS
            if text and not over.is_set():
                say(text, file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, name="watch-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def for_all(here: Launched) -> Iterator[None]:
    """Say in the block that this process waits until all have come to the place where they meet."""
    if here.address is None or here.processes is None or here.processes == 1:
        yield
        return
    roll = Roll(here, here.address, here.processes)
    with announced(roll.line, roll.join):
        yield


@dataclass
class Roll:
    """The processes that wait, as each of them writes it to the store where they meet."""

    here: Launched
    address: str
    processes: int
    _store: Any = field(default=None, repr=False)

    def join(self) -> None:
        """Write that this process has come, if the store is there."""
        if not is_listening(self.address):
            return
        from torch.distributed import TCPStore

        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(RuntimeError):  # it has just been closed: the others have met, or failed
            timeout = timedelta(seconds=CONNECT_SECONDS)
            self._store = TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
            self._store.set(self._key(self.here.rank), "here")

    def line(self) -> str:
        """What the first process says, and any that does not find it."""
        if self._store is None:
            self.join()
        if self._store is None:
            return (
                f"waiting for the first of {self.processes} processes at {self.address}: nothing answers there; "
                "start it, or set MASTER_ADDR and MASTER_PORT to its place"
            )
        missing = self._missing() if self.here.rank == 0 else 0
        if not missing:
            return ""
        remedy = "start the others, or see why they ended" if self.here.starts_all else "this process started them"
        return f"waiting for {missing} of {self.processes} processes at {self.address}: {remedy}"

    def _missing(self) -> int:
        try:
            return sum(not self._store.check([self._key(rank)]) for rank in range(self.processes))
        except RuntimeError:  # closed
            return 0

    def _key(self, rank: int) -> str:
        return f"llm_lightning/{self.here.attempt}/{rank}"


def is_listening(address: str) -> bool:
    """Whether something takes connections at HOST:PORT; PyTorch's own client would print its attempts."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False
