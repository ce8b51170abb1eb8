"""A run whose threads wait for a core says so, once, with the remedy."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from llm_lightning.cores import cores

TASKS = Path("/proc/self/task")
SECONDS = 30.0
"""Between two looks: long enough that an import or a compilation elsewhere does not count."""
# Of the time in which a thread could compute. A product on k threads ends with its last one, so that a share s of
# waiting makes it 1 / (1 - s) as long: at 0.2 a quarter is lost. Two runs that each use every core share them evenly,
# which is 0.5.
MOST_WAITING = 0.2

log = logging.getLogger(__name__)


class CpuTime(NamedTuple):
    """Of one thread, in nanoseconds."""

    running: int
    waiting: int
    """Ready to run, without a core. A thread that spins until others are done runs, so that CPU time hides this."""


class CoreWaits(L.Callback):
    """Every 30 seconds of training, compare how long the threads of this process ran and waited for a core.

    Only Linux counts the waiting; elsewhere nothing is said.
    """

    def __init__(self) -> None:
        self._since, self._before = 0.0, dict[str, CpuTime]()
        self._has_said = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._since, self._before = time.monotonic(), cpu_times()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._has_said or not self._before or time.monotonic() - self._since < SECONDS:
            return
        now = cpu_times()
        share = waiting_share(self._before, now)
        self._since, self._before = time.monotonic(), now
        if share > MOST_WAITING and trainer.local_rank == 0:
            log.warning(advice(share, torch.get_num_threads(), trainer.num_devices))
            self._has_said = True


def cpu_times(tasks: Path = TASKS) -> dict[str, CpuTime]:
    """Every thread of this process; empty where the system does not count."""
    found = {}
    for path in tasks.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            running, waiting, _ = path.read_text().split()
            found[path.parent.name] = CpuTime(int(running), int(waiting))
    return found


def waiting_share(before: dict[str, CpuTime], now: dict[str, CpuTime]) -> float:
    """Of the time between two looks in which threads could run, the share in which they waited for a core."""
    running = sum(now[name].running - before[name].running for name in now.keys() & before.keys())
    waiting = sum(now[name].waiting - before[name].waiting for name in now.keys() & before.keys())
    return waiting / max(running + waiting, 1)


def advice(share: float, threads: int, ranks: int) -> str:
    """One line: what was seen, and what to do."""
    fewer = max(1, round(threads * (1 - share)))
    remedy = "run fewer processes at a time"
    if fewer < threads:
        remedy += f", or start each with OMP_NUM_THREADS={fewer}"
    if threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        remedy += " and OMP_WAIT_POLICY=PASSIVE, so that threads that wait for others leave their core"
    each = f" in each of {ranks} processes" if ranks > 1 else ""
    return (
        f"Threads waited for a core {share:.0%} of the time in which they could compute ({threads} threads{each}, "
        f"{cores()} cores): others use them too. To train faster, {remedy}"
    )
