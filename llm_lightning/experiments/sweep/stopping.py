"""Signals to the processes around a job: which ask them to stop, and which announce that the job is requeued."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_lightning import slurm
from llm_lightning.signals import STOPPING

_KEYBOARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals that a terminal sends to all processes of a sweep."""

_received: list[int] = []
_depth = 0


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the signals that ask this process to stop; ignored ones stay ignored. Contexts within one share its list.

    A second Ctrl-C ends the process at once. In another thread than the first, nothing is handled.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield _received
        return
    if not _depth:
        _received.clear()
    _depth += 1
    taken = [signum for signum in STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, _receive) for signum in taken}
    try:
        yield _received
    finally:
        _depth -= 1
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _receive(signum: int, _: Any) -> None:
    if signum == signal.SIGINT and signum in _received:  # the user insists
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    _received.append(signum)


# --- requeueing ------------------------------------------------------------------------------------------------------


@dataclass
class Requeueing:
    """What submitit does at the end of a job's time, or when it is preempted: requeue the job, and end the process."""

    handler: Callable[[int, Any], Any]
    signum: int
    announced: list[int] = field(default_factory=list)

    def is_due(self, received: list[int]) -> bool:
        """Whether the scheduler takes the machine away and a requeued job may go on."""
        return bool(self.announced) or (bool(received) and _is_preempted())

    def __call__(self) -> str:
        """Requeue this job, which ends this process; or return why it is not requeued."""
        try:
            self.handler(self.signum, None)
        except Exception as error:
            return " ".join(str(error).split()).rstrip(".")
        return "its launcher did not requeue it"


@contextlib.contextmanager
def requeueing() -> Iterator[Requeueing | None]:
    """Hold back submitit's handler of SIGUSR2, which ends the process, within the context; None without submitit."""
    signum = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", None)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if "SUBMITIT_EXECUTOR" not in os.environ or signum is None or not in_main_thread:
        yield None
        return
    before = signal.getsignal(signum)
    if not callable(before):
        yield None
        return
    held = Requeueing(before, signum)
    signal.signal(signum, lambda number, _: held.announced.append(number))
    try:
        yield held
    finally:
        signal.signal(signum, before)


def _is_preempted() -> bool:
    """Whether SLURM preempts this job; a job that ends in its grace time is not requeued by SLURM."""
    return "SLURM_JOB_ID" in os.environ and slurm.is_preempted(slurm.show(slurm.job_id()))


# --- masks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mask_of_children() -> Iterator[None]:
    """Start a child that gets the signals of a terminal, and never SIGUSR2, which SLURM sends to all of a job."""
    with _masked(block=[signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [], unblock=_KEYBOARD):
        yield


@contextlib.contextmanager
def mask_of_launchers() -> Iterator[None]:
    """Start processes of a launcher that a terminal's signals do not end: they learn from the sweep that it stops."""
    with _masked(block=_KEYBOARD):
        yield


@contextlib.contextmanager
def _masked(block: Any = (), unblock: Any = ()) -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, block)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
