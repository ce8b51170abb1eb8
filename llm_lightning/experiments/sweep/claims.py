"""Cores and GPUs for jobs that run side by side: each claims its share by locks, which die with it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.3


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names of this process's CUDA devices, without importing torch."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(index) for index, line in enumerate(shown.stdout.splitlines()) if line.startswith("GPU ")]


def gpus_wanted(trainer: Mapping[str, Any], present: Sequence[str]) -> list[str] | int:
    """The number of GPUs that a job takes, or their names if its settings list them.

    Args:
        trainer: the settings of `trainer`.
        present: the GPUs of this machine.
    """
    if str(trainer.get("accelerator")) not in ("auto", "gpu", "cuda") or not present:
        return 0
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list) or (isinstance(devices, str) and "," in devices):
        listed = devices if isinstance(devices, list) else devices.split(",")
        return [present[int(index)] for index in listed if str(index).strip() and int(index) < len(present)]
    if str(devices) == "auto":
        return 1
    return len(present) if int(devices) == -1 else int(devices)


@contextlib.contextmanager
def claimed(
    folder: Path,
    names: Sequence[str],
    wanted: Sequence[str] | int,
    *,
    shares: int = 1,
    gives_up: Callable[[], bool] = lambda: False,
    waits: Callable[[], None] = lambda: None,
) -> Iterator[list[str] | None]:
    """Hold `wanted` of `names` within the context, waiting for them; None if `gives_up` said so.

    Args:
        folder: holds the lock files; processes that use the same folder share the names.
        wanted: how many, or which.
        shares: number of processes that may hold a name at the same time.
        waits: called once if some are in use.

    Raises:
        ValueError: if there are too few for ever.
    """
    if isinstance(wanted, int) and wanted > len(names):
        raise ValueError(f"trainer.devices={wanted} asks for more GPUs than there are ({len(names)})")
    folder.mkdir(parents=True, exist_ok=True)
    candidates = list(names) if isinstance(wanted, int) else list(wanted)
    number = wanted if isinstance(wanted, int) else len(wanted)
    has_waited = False
    while True:
        with contextlib.ExitStack() as held:
            got = _take(held, folder, candidates, number, shares)
            if len(got) == number:
                yield got
                return
        if gives_up():
            yield None
            return
        if not has_waited:
            waits()
            has_waited = True
        time.sleep(_POLL_SECONDS)


def _take(held: contextlib.ExitStack, folder: Path, candidates: Sequence[str], number: int, shares: int) -> list[str]:
    got: list[str] = []
    for share in range(shares):  # an unused device before a second job on one
        for name in candidates:
            if len(got) == number:
                return got
            lock = FileLock(folder / f"{name.replace('/', '_')}.{share}.lock")
            with contextlib.suppress(Timeout):
                if name not in got:
                    lock.acquire(timeout=0)
                    held.callback(lock.release)
                    got.append(name)
    return got


def machine_folder(cache: Path) -> Path:
    """The folder of this machine's GPU locks; the cache may be shared by several machines."""
    return cache / "gpus" / (platform.node() or "machine")
