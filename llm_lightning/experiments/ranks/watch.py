"""What a rank does when another one fails, falls silent, or makes no progress: all say so, and end.

The first rank is connected to each other one. It hands causes on; the others watch only the first. Nothing heavy
is imported.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_lightning.experiments.failures import record_cause
from llm_lightning.experiments.processes import is_stopped, kill_with_children
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.causes import Cause, Kind
from llm_lightning.experiments.ranks.line import Address, Line, Meeting, Message, Peer, met
from llm_lightning.experiments.run_folder import process_start
from llm_lightning.stacks import stacks
from llm_lightning.terminal import say

SILENT_SECONDS = 10.0
"""A rank that is not heard for this long is lost."""
END_SECONDS = 1.5
"""Seconds that a rank has to end by itself after it heard the cause; its main thread may wait for one that is gone."""
STACKS_SECONDS = 3.0
"""Seconds that a rank has to answer with its stacks."""
KILLED, STALLED, DIED = 137, 1, 1
"""Exit codes of the run: as after SIGKILL, which a stopped rank gets; no progress; ended without a word."""

log = logging.getLogger(__name__)


class Watch:
    """What a rank does with what it hears, and with silence."""

    def __init__(self, rank: int, size: int, run_dir: Path) -> None:
        self.rank, self.size, self.run_dir = rank, size, run_dir
        self.line: Line | None = None
        self._ends = False
        self._stalled: tuple[str, float] | None = None
        self._stacks: dict[int, str] = {}
        self._asked_at: float | None = None

    # --- meeting ---------------------------------------------------------------------------------------------------

    def connect(self, broadcast: Any) -> None:
        """Connect this rank and the first; a collective call.

        Args:
            broadcast: gives the first rank's object to all.
        """
        meeting = None
        if self.rank == 0:
            meeting = Meeting(os.environ.get("MASTER_ADDR", "127.0.0.1"))
            address, of_first = broadcast((meeting.address, own_facts()))
        else:
            address, of_first = broadcast(None)
        peers = meeting.peers(self.size - 1) if meeting else self._first(address, of_first)
        if meeting and (missing := {*range(1, self.size)} - {peer.rank for peer in peers}):
            log.warning("Ranks %s cannot reach rank 0 at %s: if they stop, nothing says so", missing, address.host)
        self.line = Line(peers, on_message=self._on_message, on_end=self._on_end, on_tick=self._on_tick)
        causes.connect(self.tell, self.line.close)
        self.line.start()

    def _first(self, address: Address, facts: Mapping[str, Any]) -> list[Peer]:
        try:
            return [met(address, self.rank, own_facts(), facts)]
        except OSError:
            return []

    # --- causes ----------------------------------------------------------------------------------------------------

    def tell(self, cause: Cause) -> None:
        """Tell the other ranks a cause that this one found."""
        self._ends = True
        if self.line is not None:
            self.line.send(kind="cause", cause=cause.as_dict())

    def _on_message(self, peer: Peer, message: Message) -> None:
        kind = message["kind"]
        if kind == "cause":
            cause = Cause(**message["cause"])
            self._relay(cause, peer)
            if not self._ends:
                self._end(cause)
        elif kind == "stalled" and self._asked_at is None:
            self._ask(message["message"])
        elif kind == "stacks?":
            peer.send(kind="stacks", text=stacks())
        elif kind == "stacks":
            self._stacks[peer.rank] = message["text"]

    def _relay(self, cause: Cause, source: Peer) -> None:
        assert self.line is not None
        for other in list(self.line.peers) if self.rank == 0 else ():
            if other is not source:
                other.send(kind="cause", cause=cause.as_dict())

    def _on_end(self, peer: Peer) -> None:
        if not (peer.has_left or self._ends):
            self._accuse(peer, "died", "ended without a word: killed, or out of memory", DIED)

    def _on_tick(self) -> None:
        assert self.line is not None
        now = time.monotonic()
        for peer in list(self.line.peers):
            is_silent = now - peer.heard > SILENT_SECONDS and not peer.has_left
            if is_silent and not self._ends and may_be_stopped(peer):
                message = f"{_who(peer.facts)} has not answered for {SILENT_SECONDS:.0f} s"
                self._accuse(peer, "silent", message, KILLED)
        self._look_at_stacks(now)

    def _accuse(self, peer: Peer, kind: Kind, message: str, exit_code: int) -> None:
        cause = Cause(peer.rank, kind, message, exit_code, pid=peer.facts["pid"], host=peer.facts["host"])
        if kind == "died" and causes.is_supervised():  # the supervisor knows by which signal
            causes.announce(cause)
        else:
            causes.announce(cause, self.run_dir)
            record_cause(self.run_dir, cause.line, exit_code, by_signal=True)
        kill_stopped(cause, peer.facts)
        self._end(cause)

    def _end(self, cause: Cause) -> None:
        """End this process, if it does not end by itself."""
        self._ends = True
        causes.hear(cause)
        causes.as_fellow(cause)
        time.sleep(END_SECONDS)
        causes.end_at_once(causes.FELLOW_FAILED)

    # --- no progress -------------------------------------------------------------------------------------------------

    def stalled(self, message: str) -> None:
        """End the run, which makes no progress; the watchdog's thread calls it."""
        self._stalled = (message, time.monotonic())
        if self.line is None:
            self._end_stalled(message)
        elif self.rank != 0:
            self.line.send(kind="stalled", message=message)

    def _look_at_stacks(self, now: float) -> None:
        """Go on with what `stalled` began: the first rank collects the stacks, or each rank gives its own."""
        if self._asked_at is not None and now - self._asked_at > STACKS_SECONDS:
            self._end_stalled(self._stalled[0] if self._stalled else "no progress")
        elif self._stalled is not None and self._asked_at is None:
            if self.rank == 0:
                self._ask(self._stalled[0])
            elif now - self._stalled[1] > 2 * STACKS_SECONDS:
                self._end_stalled(self._stalled[0])

    def _ask(self, message: str) -> None:
        assert self.line is not None
        self._stalled = self._stalled or (message, time.monotonic())
        self._asked_at = time.monotonic()
        self.line.send(kind="stacks?")

    def _end_stalled(self, message: str) -> None:
        for peer in self.line.peers if self.line is not None else ():
            if peer.rank not in self._stacks and not peer.has_left and is_stopped_here(peer):
                words = f"{_who(peer.facts)} is stopped: {message}"
                self._accuse(peer, "silent", words, KILLED)
        found = {self.rank: stacks(), **self._stacks}
        for rank in sorted(found):
            say(f"--- Python stacks of rank {rank} of {self.size} ---\n{found[rank]}", file=sys.stderr, flush=True)
        silent = sorted({*range(self.size)} - set(found)) if self.rank == 0 else []
        words = f"{message}; the stacks are above" + (f", but of ranks that do not answer: {silent}" if silent else "")
        cause = Cause(self.rank, "stalled", words, STALLED)
        if not causes.announce(cause, self.run_dir):
            who = f"rank {self.rank}: " if self.size > 1 else ""
            say(f"error: {who}{words}", file=sys.stderr, flush=True)
        record_cause(self.run_dir, words, STALLED)
        time.sleep(END_SECONDS if self.size > 1 else 0)
        causes.end_at_once(STALLED)


def own_facts() -> dict[str, Any]:
    """What other ranks know of this one."""
    pid = os.getpid()
    return {
        "pid": pid,
        "host": platform.node(),
        "started": process_start(pid),
        "elastic": os.environ.get(causes.ELASTIC),
    }


def may_be_stopped(peer: Peer) -> bool:
    """Whether silence means that a rank is stopped; one of this machine may also be busy, which its state tells."""
    return peer.facts["host"] != platform.node() or is_stopped(peer.facts["pid"]) is not False


def is_stopped_here(peer: Peer) -> bool:
    """Whether a rank of this machine is stopped."""
    return peer.facts["host"] == platform.node() and is_stopped(peer.facts["pid"]) is True


def kill_stopped(cause: Cause, facts: Mapping[str, Any]) -> None:
    """Kill a stopped rank of this machine, which no other signal ends."""
    if cause.kind != "silent" or cause.host != platform.node():
        return
    causes.write_elastic(facts.get("elastic"), cause)
    if facts["started"] is not None and process_start(cause.pid) == facts["started"]:
        kill_with_children(cause.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _who(facts: Mapping[str, Any]) -> str:
    return f"process {facts['pid']} on {facts['host']}"
