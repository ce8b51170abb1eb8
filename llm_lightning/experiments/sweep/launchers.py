"""What differs between Hydra's launchers: who gives out the machine, and what is lost when a process dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_lightning.experiments.sweep import claims
from llm_lightning.experiments.sweep.attempt import Share, under_way
from llm_lightning.experiments.sweep.folder import Process

_WATCH_SECONDS = 1.0
_QUEUE_SECONDS = 10.0
"""Seconds between two looks at SLURM's queue."""


@dataclass(frozen=True)
class Traits:
    """How a launcher runs jobs."""

    share: Share
    """What each job gets."""
    in_this_process: bool = False
    """Whether a call of `launch` attempts its jobs in this process, one after the other."""
    at_a_time: int = 1
    """Calls of `launch` at a time, of one job each; 0: one call for all jobs."""
    workers: int | None = None
    """`n_jobs`, if the launcher has that setting."""
    is_slurm: bool = False
    shares_fate: bool = False
    """Whether the death of one process loses the jobs of others."""


def traits_of(launcher: Any, n_jobs: int, jobs_per_gpu: int) -> Traits:
    """The traits of the launcher with this configuration, for `n_jobs` jobs.

    k jobs at a time get cores / k threads each: processes that all use every core are many times slower. submitit's
    processes run one job each, so no fork server pays. SLURM itself gives out cores and GPUs.
    """
    name = str(launcher.get("_target_")).rpartition(".")[2]
    if name == "SlurmLauncher":
        return Traits(Share(names_lines=True), at_a_time=0, is_slurm=True)
    here = Share(gpus=claims.visible_gpus(), jobs_per_gpu=jobs_per_gpu, names_lines=True)
    if name == "BasicLauncher":
        return Traits(Share(None, here.gpus, jobs_per_gpu, forks=True), in_this_process=True)
    if name == "JoblibLauncher":
        asked = int(launcher.get("n_jobs") or 1)
        workers = max(1, min(asked if asked > 0 else claims.cores() + 1 + asked, n_jobs))
        share = Share(claims.threads_each(workers), here.gpus, jobs_per_gpu, forks=True, names_lines=True)
        return Traits(share, at_a_time=0, workers=workers, shares_fate=True)
    if name == "LocalLauncher":
        asked = int(launcher.get("cpus_per_task") or max(1, claims.cores() // n_jobs))
        at_a_time = max(1, min(claims.cores() // asked, n_jobs))
        share = Share(claims.threads_each(at_a_time), here.gpus, jobs_per_gpu, names_lines=True)
        return Traits(share, at_a_time=at_a_time)
    return Traits(here, at_a_time=0)


# --- joblib ----------------------------------------------------------------------------------------------------------


def end_with(head: Process) -> None:
    """Let this worker of joblib end when the sweep's process has died: by itself, it waits for minutes."""

    def watch() -> None:
        while not head.has_ended():
            time.sleep(_WATCH_SECONDS)
        with under_way:  # a job saves first
            os._exit(1)

    threading.Thread(target=watch, name="watch-sweep", daemon=True).start()


def end_workers(*, kill: bool) -> None:
    """End joblib's workers, which otherwise wait for more jobs."""
    module = sys.modules.get("joblib.externals.loky.reusable_executor")
    executor = getattr(module, "_executor", None)
    if executor is not None:
        executor.shutdown(wait=True, kill_workers=kill)


# --- submitit --------------------------------------------------------------------------------------------------------


@dataclass
class Submitted:
    """What this process knows of the jobs that submitit has given to SLURM in one call."""

    number: str | None = None
    """Of the job, or of the array of jobs."""
    errors: list[str] = field(default_factory=list)
    """One for each job whose end is known, in their order; empty for those that ended by themselves."""
    _looked: float = 0.0
    _missed: int = 0

    def is_gone(self) -> bool:
        """Whether SLURM's queue holds none of the jobs any more, as seen twice."""
        if self.number is None or time.monotonic() - self._looked < _QUEUE_SECONDS:
            return self._missed > 1
        self._looked = time.monotonic()
        shown = _run("squeue", "--noheader", "--format=%i", f"--jobs={self.number}")
        is_absent = not shown.stdout.strip() if shown.returncode == 0 else "nvalid job id" in shown.stderr
        self._missed = self._missed + 1 if is_absent else 0
        return self._missed > 1

    def cancel_waiting(self) -> None:
        """Take jobs that have not begun out of the queue."""
        if self.number is not None:
            _run("scancel", "--state=PENDING", self.number)


def remove_links(folder: Path) -> None:
    """Remove submitit's links to scripts that it has submitted: nothing reads them again, and a sweep refuses links."""
    submissions = folder / ".submitit"
    for link in () if submissions.is_symlink() else submissions.glob(".submission_file_*.sh"):
        if link.is_symlink():
            link.unlink(missing_ok=True)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


@contextlib.contextmanager
def submitted_jobs() -> Iterator[Submitted]:
    """Let submitit wait for all its jobs: its results raise at the first lost one, and lose those of the others.

    A lost job is recognised by its folder, where its end is missing.
    """
    known = Submitted()
    try:
        from submitit.core.core import Job
    except ImportError:
        yield known
        return
    original = Job.results

    def results(self: Any) -> Any:
        known.number = self.job_id.partition("_")[0]
        try:
            found = original(self)
        except Exception as error:  # whatever became of it
            known.errors.append(str(error))
            return [error]
        known.errors.append("")
        return found

    Job.results = results  # type: ignore[method-assign]
    try:
        yield known
    finally:
        Job.results = original  # type: ignore[method-assign]
