"""The name of a run folder that nobody named: the same on all processes, and again after a restart."""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from llm_lightning.experiments.ranks import waiting
from llm_lightning.experiments.ranks.launcher import Launched, is_batch_script, launched, uses_agent_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

MEET_SECONDS = 1800.0
"""PyTorch's own limit for processes to meet."""
_KEY, _READ = "llm_lightning/run", "llm_lightning/run_read"
_kept: list[TCPStore] = []


def drawn_name() -> str:
    """Date, time and eight random digits: runs started in the same second differ."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(4)}"


def shared_name(words: Sequence[str]) -> str | None:
    """The name for this run, if other processes must have the same; None if this one may draw its own.

    A restart of torchrun and a requeued job of SLURM find it again.

    Args:
        words: of the command line. Two commands of one batch script are two runs.

    Raises:
        ValueError: if the processes do not meet.
    """
    here = launched()
    if here.id is not None and here.by == "none":
        if _a_person_types():
            return None
        if is_batch_script():
            return f"{here.id}_{hashlib.sha256(repr(list(words)).encode()).hexdigest()[:8]}"
    if here.id is not None:
        return here.id
    if here.by == "none" or here.address is None or here.processes in (None, 1):
        return None
    from torch.distributed import DistError

    with waiting.for_all(here):
        try:
            return _told_by_first(here, drawn_name())
        except DistError as error:
            raise not_met(here, error) from error


def _a_person_types() -> bool:
    """Whether this process has a terminal, as in `srun --pty zsh`: each command is a run, and nothing requeues it."""
    return sys.stdin is not None and sys.stdin.isatty()


def not_met(here: Launched, error: Exception) -> ValueError:
    """The error of processes that did not meet in time, or whose port is taken."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return ValueError(
        f"the {here.processes} processes of this run did not meet at {here.address} ({reason}); "
        "start all of them, or choose another port with MASTER_PORT"
    )


def _told_by_first(here: Launched, drawn: str) -> str:
    """The name that the first process has drawn, through a store at the place where the processes meet."""
    from torch.distributed import TCPStore

    assert here.address is not None
    assert here.processes is not None
    host, _, port = here.address.rpartition(":")
    timeout = timedelta(seconds=MEET_SECONDS)
    if uses_agent_store():  # the first name stays there until torchrun ends
        store = TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
        return store.compare_set(_KEY, "", drawn).decode() if here.rank == 0 else store.get(_KEY).decode()
    store = TCPStore(host, int(port), here.processes, here.rank == 0, timeout, multi_tenant=True)
    if here.rank != 0:
        return store.get(_KEY).decode()
    store.set(_KEY, drawn)
    _kept.append(store)  # the process group uses it too; without it, a later process would find nothing
    return drawn
