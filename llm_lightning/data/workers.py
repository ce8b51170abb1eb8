"""Loader processes: they leave signals to their parent, and end with it, however it ends."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from llm_lightning.signals import STOPPING, held_back, signal_at_death_of

_started: WeakSet[BaseProcess] = WeakSet()


class Loader(DataLoader):
    """A DataLoader whose workers survive a signal to the whole process group, so that the run can save itself.

    Whatever a worker needs (the samples, `collate_fn`, `worker_init_fn`) must be picklable, and should be small: macOS
    and Windows send it to every worker.
    """

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        if not are_forked():
            resource_tracker.ensure_running()  # it unblocks signals itself
        with held_back():  # a worker cannot protect itself before `begin`
            iterator: Any = super()._get_iterator()
        _started.update(iterator._workers)
        atexit.unregister(_end_workers)  # last in, first out: before PyTorch waits for each of them in turn
        atexit.register(_end_workers)
        return iterator


def are_forked() -> bool:
    """Whether workers are forks of this process, as on Linux, and not started afresh."""
    return multiprocessing.get_start_method() == "fork"


def begin_with() -> Callable[[int], None]:
    """What every worker of this process does first."""
    # The system takes the thread that starts the worker for its parent, and other threads end earlier.
    is_main = threading.current_thread() is threading.main_thread()
    return functools.partial(begin, parent=os.getpid() if is_main else None)


def begin(worker: int, *, parent: int | None) -> None:
    """Ignore the signals that the run itself answers, and end with the process `parent`."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    if parent is not None and sys.platform == "linux":  # elsewhere PyTorch's worker checks every 5 seconds
        signal_at_death_of(parent, signal.SIGKILL)


def _end_workers() -> None:
    """Kill the workers that are left at the end of the process: they ignore SIGTERM, and it would wait for them."""
    living = [worker for worker in _started if worker.is_alive()]
    if living and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for worker in living:
        worker.kill()
