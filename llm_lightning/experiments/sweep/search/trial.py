"""One trial: its jobs, which differ in their seed, what has become of them, and what they say of the trial."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_records import PRUNED, read_summary
from llm_lightning.experiments.sweep.folder import STOP
from llm_lightning.experiments.sweep.runner import Job
from llm_lightning.experiments.sweep.search.judge import Judge, Rows, validations
from llm_lightning.files.atomic import write_atomically

LOOK_SECONDS = 0.5
"""Seconds between two looks at the metrics of a running job."""

End = Literal["complete", "pruned", "failed"]


@dataclass
class SearchTrial:
    """A trial that is asked and not told yet."""

    number: int
    params: dict[str, Any]
    monitor: str
    judge: Judge
    names_files: bool = False
    """Whether its parameters name files, so that an error of the system may come from them."""
    jobs: Sequence[Job] = ()
    end: End | None = None
    """How it ended; None while it goes on, or is stopped."""
    reason: str | None = None
    """Why it has no value, or why it cannot end."""
    values: dict[str, float] = field(default_factory=dict)
    """Job's name -> its best value."""

    def begin(self, position: int) -> Job | None:
        """The job that must run next, after what it has recorded already is judged; None if there is none.

        Whatever an earlier start has left is taken as it is: a job that ended, and one whose rows prune the trial.
        """
        self.judge.begin_job()
        job = self.jobs[position]
        self._judge(job, validations(job.folder, self.monitor))
        if self.end is None and job.state() == "open" and not _is_out_of_time(job.folder):
            (job.folder / STOP).unlink(missing_ok=True)
            return job
        self.conclude(position)
        return None

    def conclude(self, position: int) -> None:
        """Judge the end of a job. A trial that is neither ended nor at its next job then is stopped."""
        job = self.jobs[position]
        (job.folder / STOP).unlink(missing_ok=True)
        self._judge(job, validations(job.folder, self.monitor))
        if self.end is not None:
            return
        best = self.judge.best_of_jobs[-1]
        if self.has_ended(job):
            if best is None:
                self.fail(f"{job.name} never measured {self.monitor}")
            else:
                self.values[job.name] = best
                self.end = "complete" if position == len(self.jobs) - 1 else None
        elif failure := Failure.read(job.folder):
            self.reason = f"{job.name}: {failure.message}"
            if failure.kind != "os" or self.names_files:  # else every trial would fail: a missing file, a full disk
                self.end = "failed"

    def has_ended(self, job: Job) -> bool:
        """Whether a job has trained as long as it was told to."""
        return bool(read_summary(job.folder).get("finished")) or _is_out_of_time(job.folder)

    def fail(self, reason: str) -> None:
        self.end, self.reason = "failed", reason

    def look(self, position: int, rows: Rows) -> None:
        """Judge the new rows of a job that runs; stop it if they prune the trial."""
        self._judge(self.jobs[position], rows.settled())
        if self.end == "pruned":
            (self.jobs[position].folder / STOP).touch()

    def _judge(self, job: Job, rows: Sequence[float]) -> None:
        if self.end is None and self.judge.judge(rows):
            n_rows, value = max(self.judge.values.items())
            self.end = "pruned"
            self.reason = f"pruned at validation {n_rows}: {self.monitor} {value:.4f}"
            write_atomically(job.folder / PRUNED, json.dumps({"reason": self.reason}, indent=2) + "\n")


def _is_out_of_time(folder: Path) -> bool:
    """Whether `trainer.max_time`, the budget of each job, has ended it."""
    return read_summary(folder).get("stopped_by") == "time"


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every now and then, in a thread; what it raises is raised at the end."""
    over, raised = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not over.wait(LOOK_SECONDS):
                look()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="watch-trials", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if raised:
        raise raised[0]
