"""Signals that stop a process, and how it notices the death of its parent. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from llm_lightning.terminal import say

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals of schedulers, terminals and people that ask a process to save and end."""
BLOCKED_SECONDS = 5.0
"""Seconds in which Python handles a signal, unless the main thread is in a call of a library that waits."""
BEFORE, AFTER = "before training; the same command starts again", "after training; the same command ends the run"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_received: list[int] | None = None
"""Within `ending`: the signals that have asked this process to end. The first decides, later ones change nothing."""


class Stopped(SystemExit):
    """A signal ended the process while it did not train. Not an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.message = f"stopped by {signal.Signals(signum).name} {_moment[0]}"


_moment = [BEFORE]


def asked_to_end(signum: int | None = None) -> int | None:
    """The first signal that has asked this process to end, within `ending`; `signum` is one that others handle."""
    if signum is not None and _received is not None:
        _received.append(signum)
    return _received[0] if _received else None


def trained() -> None:
    """State that from here on a signal loses nothing."""
    _moment[0] = AFTER


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Let the first stop signal raise `Stopped` (Ctrl-C: KeyboardInterrupt), until other handlers take it.

    SLURM, and a parent that forwards what its whole group got, repeat a signal within milliseconds: later ones change
    nothing, until the process has ended; a second Ctrl-C ends it at once. A signal that is ignored stays so.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = []
    _moment[0] = BEFORE
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {signum: signal.getsignal(signum) for signum in STOPPING if signal.getsignal(signum) in usual}
    for signum in before:
        signal.signal(signum, _end)
    try:
        with _watched():
            yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if _received and signum != signal.SIGINT else handler)
        _received = None


def _end(signum: int, _: FrameType | None) -> None:
    is_keyboard, is_first = signum == signal.SIGINT, not _received
    if is_keyboard and _received and signum in _received:  # the user insists
        end_at_once(signum)
    asked_to_end(signum)
    if is_first:
        raise KeyboardInterrupt if is_keyboard else Stopped(signum)


def end_at_once(signum: int) -> None:
    """End this process as the signal does where nothing handles it."""
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """End the process where a signal finds the main thread in a call that does not return.

    Such a call waits for the other processes of a run. Python's handlers run after it, the system's part at once: it
    writes the signal's number to a pipe, from which a thread reads.
    """
    if os.name == "nt":
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _pipes.append(writing)
    over = threading.Event()
    threading.Thread(target=_watch, args=(reading, over), name="watch-signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _pipes.remove(writing)
        signal.set_wakeup_fd(before)
        os.close(writing)  # the thread ends


def _watch(reading: int, over: threading.Event) -> None:
    while numbers := os.read(reading, 64):
        signum = next((number for number in numbers if number in STOPPING), None)
        if signum is None or over.wait(BLOCKED_SECONDS):
            continue
        if not _received and signal.getsignal(signum) is _end:
            say(Stopped(signum).message, file=sys.stderr, flush=True)
            os._exit(128 + signum)
    os.close(reading)


_pipes: list[int] = []


def _leave_pipe() -> None:
    if _pipes and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):  # a signal to a child must not reach its parent's pipe
    os.register_at_fork(after_in_child=_leave_pipe)


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
