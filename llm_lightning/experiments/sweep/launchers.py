"""What differs between Hydra's launchers: how many jobs run at a time, and how many threads each may use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm_lightning.experiments.sweep.claims import cores


@dataclass(frozen=True)
class Traits:
    """How a launcher runs a batch of jobs."""

    one_by_one: bool
    """Whether each job is a call of `launch` in this process."""
    workers: int | None = None
    """Jobs on this machine at a time; None: the launcher's business."""
    threads: int | None = None
    """Threads of each job; None leaves that open."""
    needs_slots: bool = False
    """Whether the launcher starts all jobs at once, so that they must wait for each other."""


def traits_of(launcher: Any, n_jobs: int) -> Traits:
    """The traits of the launcher with this configuration, for `n_jobs` jobs.

    k jobs at a time get cores / k threads each: processes that all use every core are many times slower.
    """
    name = str(launcher.get("_target_")).rpartition(".")[2]
    if name == "BasicLauncher":
        return Traits(one_by_one=True)
    if name == "JoblibLauncher":
        asked = int(launcher.get("n_jobs") or 1)
        workers = max(1, min(asked if asked > 0 else cores() + 1 + asked, n_jobs))
        return Traits(one_by_one=False, workers=workers, threads=max(1, cores() // workers))
    if name == "LocalLauncher":
        threads = int(launcher.get("cpus_per_task") or max(1, cores() // min(n_jobs, cores())))
        workers = max(1, min(cores() // threads, n_jobs))
        return Traits(one_by_one=False, workers=workers, threads=threads, needs_slots=True)
    if name == "SlurmLauncher":
        asked = launcher.get("cpus_per_task")
        return Traits(one_by_one=False, threads=int(asked) if asked else None)
    return Traits(one_by_one=False)


@contextlib.contextmanager
def results_that_never_raise() -> Iterator[None]:
    """Let submitit wait for all its jobs: its results raise at the first lost one, and lose those of the others.

    A lost job is recognised by its folder, where its end is missing.
    """
    try:
        from submitit.core.core import Job
    except ImportError:
        yield
        return
    original = Job.results

    def results(self: Any) -> Any:
        try:
            return original(self)
        except Exception as error:  # whatever became of it
            return [error]

    Job.results = results  # type: ignore[method-assign]
    try:
        yield
    finally:
        Job.results = original  # type: ignore[method-assign]
