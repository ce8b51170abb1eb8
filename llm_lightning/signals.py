"""Signals that tell a process to stop, and how it learns that its parent is gone. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""What schedulers, terminals and people send to a process that is to save itself and end."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let the signals of `STOPPING` wait until the block ends; a process that is started in it never sees one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_at_death_of(parent: int, signum: int) -> bool:
    """Ask the system to send `signum` to this process when its parent ends, whose pid is `parent`.

    "Parent" is the thread that started this process. Where it is gone already, `signum` comes at once.

    Returns:
        whether the system can do that: Linux.
    """
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None) if sys.platform == "linux" else None
    if prctl is None or prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)
    return True
