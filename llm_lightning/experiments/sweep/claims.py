"""Cores and GPUs for jobs that run side by side: each claims its share by locks, which die with it."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_lightning.cores import cores
from llm_lightning.experiments.ranks.launcher import launched

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_POLL_SECONDS = 0.3


# --- cores -----------------------------------------------------------------------------------------------------------


def threads_each(jobs: int) -> int:
    """Threads of each of `jobs` that run at a time: its part of the cores, or fewer if the user set fewer."""
    own = os.environ.get(THREADS[0], "").partition(",")[0]
    part = max(1, cores() // jobs)
    return min(part, int(own)) if own.isdigit() and int(own) else part


def threads_of(given: int | None, trainer: Mapping[str, Any], environment: Mapping[str, str]) -> int | None:
    """Threads of each process of a job, None if that is open.

    Args:
        given: for the whole job; None: those that SLURM allots, if it has started the job.
    """
    devices = str(trainer.get("devices"))
    processes = int(devices) if devices.isdigit() else 1
    if given is None and "SUBMITIT_EXECUTOR" in environment and "SLURM_CPUS_ON_NODE" in environment:
        given = int(environment["SLURM_CPUS_ON_NODE"])
        tasks = environment.get("SLURM_NTASKS_PER_NODE", "1")
        processes = int(tasks) if tasks.isdigit() and int(tasks) > 1 else processes
    here = launched(environment)
    if here.starts_all:
        processes = here.per_node[0]
    return None if given is None else max(1, given // max(1, processes))


# --- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """GPUs that are held."""

    names: tuple[str, ...] = ()
    """As `CUDA_VISIBLE_DEVICES` names them."""
    descriptors: tuple[int, ...] = ()
    """Of the lock files: a process that inherits them holds the GPUs too."""


def visible_gpus() -> tuple[str, ...]:
    """The names of this process's CUDA devices, as `CUDA_VISIBLE_DEVICES` takes them, without importing torch.

    By UUID where the driver tells it: a device has one name in all sweeps.
    """
    if VISIBLE not in os.environ:
        return tuple(uuid for _, uuid in _gpus_by_driver())
    names = [name.strip() for name in os.environ[VISIBLE].split(",")]
    seen = [name for name in (names[: names.index("-1")] if "-1" in names else names) if name]  # CUDA reads up to -1
    models = _gpus_by_driver() if seen and all(name.isdigit() for name in seen) else []
    is_ordered = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({model for model, _ in models}) == 1
    if models and is_ordered and all(int(name) < len(models) for name in seen):
        seen = [models[int(name)][1] for name in seen]
    return tuple(dict.fromkeys(seen))


def _gpus_by_driver() -> list[tuple[str, str]]:
    """Model and UUID of each GPU, or of its parts where it is divided (MIG)."""
    if shutil.which("nvidia-smi") is None:
        return []
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    found: list[tuple[str, str]] = []
    for model, uuid in re.findall(r"^\s*(?:GPU \d+: )?(.+?) \(UUID: ([\w/-]+)\)", shown.stdout, re.MULTILINE):
        if uuid.startswith("MIG-") and found and found[-1][1].startswith("GPU-"):
            found.pop()  # only its parts can be used
        found.append((model, uuid))
    return found


def listed(devices: Any) -> list[int]:
    """The device numbers of `trainer.devices` if it lists them: [0, 2] or "0,2"; else empty."""
    values = devices if isinstance(devices, list) else devices.split(",") if "," in str(devices) else []
    return [int(value) for value in values if str(value).strip()]


def gpus_wanted(trainer: Mapping[str, Any], present: Sequence[str]) -> list[str] | int:
    """The number of GPUs that a job takes, or their names if its settings list them. Not said: one.

    Args:
        trainer: the settings of `trainer`.
        present: the GPUs of this machine.

    Raises:
        ValueError: if there are too few.
    """
    if str(trainer.get("accelerator")) not in ("auto", "gpu", "cuda") or not present:
        return 0
    devices = trainer.get("devices", "auto")
    numbers = listed(devices)
    number = {"auto": 1, "-1": len(present)}.get(str(devices)) or (0 if numbers else int(devices))
    if number > len(present) or any(one >= len(present) for one in numbers):
        raise ValueError(f"trainer.devices={devices} asks for more GPUs than this machine shows ({len(present)})")
    return [present[one] for one in numbers] or number


@contextlib.contextmanager
def claimed(
    folder: Path,
    names: Sequence[str],
    wanted: Sequence[str] | int,
    *,
    shares: int = 1,
    gives_up: Callable[[], bool] = lambda: False,
    waits: Callable[[], None] = lambda: None,
) -> Iterator[Claim | None]:
    """Hold `wanted` of `names` within the context, waiting for them; None if `gives_up` said so.

    Args:
        folder: holds the lock files; processes that use the same folder share the names.
        wanted: how many, or which.
        shares: number of processes that may hold a name at the same time.
        waits: called once if some are in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    candidates = list(names) if isinstance(wanted, int) else list(wanted)
    number = wanted if isinstance(wanted, int) else len(wanted)
    has_waited = False
    while True:
        with contextlib.ExitStack() as held:
            got = _take(held, folder, candidates, number, shares)
            if len(got) == number:
                yield Claim(tuple(got), tuple(got.values()))
                return
        if gives_up():
            yield None
            return
        if not has_waited:
            waits()
            has_waited = True
        time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))  # two that each hold half give way in turn


def _take(
    held: contextlib.ExitStack, folder: Path, candidates: Sequence[str], number: int, shares: int
) -> dict[str, int]:
    """Lock up to `number` of the candidates until `held` ends: name -> file descriptor of its lock."""
    got: dict[str, int] = {}
    for share in range(shares):  # an unused device before a second job on one
        for name in candidates:
            if len(got) == number:
                return got
            lock = FileLock(folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.{share}.lock")
            with contextlib.suppress(Timeout):
                if name not in got:
                    lock.acquire(timeout=0)
                    held.callback(lock.release)
                    got[name] = lock._context.lock_file_fd or 0
    return got


def machine_folder(cache: Path) -> Path:
    """The folder of this machine's GPU locks: the cache may be shared by machines, a machine by SLURM's jobs."""
    job = os.environ.get("SLURM_JOB_ID")  # each may call its own GPU 0
    return cache / "gpus" / "-".join(filter(None, [platform.node() or "machine", job]))
