"""Signals that stop a process, and how it notices the death of its parent. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals of schedulers, terminals and people that ask a process to save and end."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block the signals of `STOPPING` within the context; a process that is started in it never gets one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_at_death_of(parent: int, signum: int) -> bool:
    """Ask the system to send `signum` to this process when its parent, of pid `parent`, ends.

    "Parent" is the thread that started this process. If it has ended already, `signum` is sent at once.

    Returns:
        whether the system supports it: Linux does.
    """
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None) if sys.platform == "linux" else None
    if prctl is None or prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)
    return True
