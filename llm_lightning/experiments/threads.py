"""Threads of a run's processes: each local rank takes its part of the cores, unless the user typed a number."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cores import cores
from llm_lightning.experiments.ranks.launcher import launched

if TYPE_CHECKING:
    import lightning as L

THREADS = "OMP_NUM_THREADS"

log = logging.getLogger(__name__)

_ours: tuple[int, int] | None = None
"""PyTorch's own number of threads, and the one that the last run of this process set in its place."""
_exported: str | None = None
"""OMP_NUM_THREADS as a run of this process set it, for the processes that it started."""


def divide_cores(trainer: L.Trainer, num_workers: int) -> None:
    """Set the threads of this process, before the Trainer starts the others.

    A number that was typed wins. torchrun sets OMP_NUM_THREADS=1 where none was typed, and leaves the other cores
    idle: its number is replaced. One process keeps PyTorch's own number, unless a quota or SLURM allows fewer.

    Args:
        num_workers: loader processes of each rank.
    """
    import torch  # late: `choose_wait_policy` comes before
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    global _ours, _exported
    by_torchrun, typed = _set_by_torchrun(os.environ), os.environ.get(THREADS)
    if typed not in (None, _exported) and not by_torchrun:
        return
    ranks, current = trainer.num_devices, torch.get_num_threads()
    own = _ours[0] if _ours is not None and _ours[1] == current else current  # at first: the physical cores
    allowed = cores() if by_torchrun else min(cores(), own)
    environment = getattr(trainer.strategy, "cluster_environment", None)  # a single device has none
    is_own = isinstance(environment, SLURMEnvironment) and _is_own_share(os.environ)
    threads = threads_of_rank(allowed, 1 if is_own else ranks, num_workers)
    if threads != current:
        torch.set_num_threads(threads)
        _ours = own, threads
    if trainer.strategy.launcher is not None:  # Lightning's own division knows neither quotas nor SLURM's shares
        os.environ[THREADS] = _exported = str(threads)
    if (ranks > 1 or threads < allowed) and trainer.is_global_zero:
        torchruns = "; torchrun's OMP_NUM_THREADS=1 was not typed, and is replaced" if by_torchrun else ""
        log.info("Threads: %d of %d cores for each of %d processes%s", threads, allowed, ranks, torchruns)


def threads_of_rank(allowed: int, ranks: int, num_workers: int) -> int:
    """Threads of one of `ranks` processes that share `allowed` cores, each with `num_workers` loader processes.

    Loader processes mostly wait, with two batches ready: they get a core each, but at most a quarter of the cores.
    """
    share = max(1, allowed // ranks)
    return max(share - num_workers, share - share // 4)


def choose_wait_policy(trainer: Mapping[str, Any]) -> None:
    """Let the idle OpenMP threads of several processes on one CPU sleep; effective only before torch is loaded.

    By default they spin, and take the cores from the threads of the other ranks and from those that send gradients.

    Args:
        trainer: the settings of `trainer`.
    """
    if "torch" not in sys.modules and _shares_a_cpu(trainer):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _shares_a_cpu(trainer: Mapping[str, Any]) -> bool:
    here, devices = launched(), str(trainer.get("devices"))
    is_many = here.per_node[0] > 1 if here.starts_all else devices.isdigit() and int(devices) > 1
    return trainer.get("accelerator") in ("cpu", "auto") and is_many


def _is_own_share(environment: Mapping[str, str]) -> bool:
    """Whether the cores of this task of SLURM are its own, not those of all tasks on the node."""
    on_node = environment.get("SLURM_CPUS_ON_NODE", "")
    return environment.get("SLURM_CPUS_PER_TASK", "").isdigit() or (on_node.isdigit() and cores() < int(on_node))


def _set_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS is torchrun's: its own environment, which Linux shows as it was at its start, has none.

    Where that cannot be read, the number counts as typed.
    """
    if environment.get(THREADS) != "1" or "TORCHELASTIC_RUN_ID" not in environment:
        return False
    try:
        before = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return bool(before) and not any(one.startswith(f"{THREADS}=".encode()) for one in before.split(b"\0"))
