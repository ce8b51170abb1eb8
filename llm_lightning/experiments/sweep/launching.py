"""Jobs that a launcher runs in processes of its own: wait until their folders say that they ended, or it lost them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.sweep import folder as records
from llm_lightning.experiments.sweep.folder import SweepRef
from llm_lightning.experiments.sweep.launchers import Submitted, Traits, end_workers, submitted_jobs
from llm_lightning.experiments.sweep.stopping import mask_of_launchers
from llm_lightning.terminal import say

POLL_SECONDS = 0.3
LAUNCHER_SECONDS = 10.0
"""Seconds until a launcher has noticed that its jobs ended; some never do."""
SHOWN = 300
"""Maximum number of characters of a launcher's reason."""


class Job(Protocol):
    """What is needed of a job."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...


class Launching:
    """The jobs of one start of a sweep, run by a launcher with processes of its own."""

    def __init__(
        self,
        sweep: SweepRef,
        jobs: Sequence[Any],
        traits: Traits,
        launchers: Callable[[int | None], Any],
        words: Callable[[Any], list[str]],
        received: Sequence[int],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; `run` starts.

        Args:
            launchers: makes a launcher, with this number of workers.
            words: the overrides of a job, as the launcher takes them.
            received: signals that ask the sweep to stop, as they come.
            ended: is called when a job has ended.
        """
        self.sweep, self.jobs, self.traits, self.received = sweep, jobs, traits, received
        self.launchers, self.words = launchers, words
        self.name = Path(sweep.folder).name
        self.ended = ended
        self.shown: dict[str, str] = {}
        self.why = ""

    def run(self) -> None:
        """Run all jobs. One that the launcher lost is recorded as failed, after a second trial if another's end may
        have been the cause."""
        left = list(self.jobs)
        while left and not self.received:
            self._launch(left, self.traits.workers)
            lost = [job for job in left if self._state(job) in ("running", "requeued", "lost")]
            waiting = [job for job in left if self._state(job) == "waiting"]
            for job in lost:
                if self.traits.shares_fate and not self.received:  # the cause may have been another job
                    say(f"Sweep {self.name}: {job.name} was lost by the launcher, and runs again alone", flush=True)
                    records.forget_attempt(job.folder)
                    self._launch([job], 1)
                self._record_if_lost(job)
            if len(waiting) == len(left) or not self.traits.shares_fate:
                for job in waiting:
                    self._record_if_lost(job)
                return
            left = waiting

    def _launch(self, jobs: Sequence[Any], workers: int | None) -> None:
        """Give jobs to the launcher, and wait until all have ended or are lost."""
        groups = deque([[job] for job in jobs] if self.traits.at_a_time else [list(jobs)])
        raised: list[BaseException] = []
        threads = [
            threading.Thread(target=self._call, args=(self.launchers(workers), groups, raised), daemon=True)
            for _ in range(min(self.traits.at_a_time or 1, len(groups)))
        ]
        with submitted_jobs() as submitted:
            with mask_of_launchers():  # which threads inherit, and what they start
                for thread in threads:
                    thread.start()
            self._wait(jobs, threads, submitted)
            if not (self.received and self.traits.is_slurm):  # without accounts, submitit waits for what was cancelled
                for thread in threads:
                    thread.join(timeout=LAUNCHER_SECONDS)
        end_workers(kill=any(thread.is_alive() for thread in threads))
        self.why = next((" ".join(str(error).split()) for error in [*raised, *filter(None, submitted.errors)]), "")

    def _call(self, launcher: Any, groups: deque[list[Any]], raised: list[BaseException]) -> None:
        while groups and not self.received:
            try:
                group = groups.popleft()
                launcher.launch([self.words(job) for job in group], initial_job_idx=self.jobs.index(group[0]))
            except BaseException as error:  # whatever the launcher makes of a lost job
                raised.append(error)

    def _wait(self, jobs: Sequence[Any], threads: Sequence[threading.Thread], submitted: Submitted) -> None:
        beaten, stopping = time.monotonic(), False
        while any(thread.is_alive() for thread in threads):
            if self.received and not stopping:
                records.end(self.sweep)  # every job reads it, saves and ends
                submitted.cancel_waiting()
                stopping = True
            if time.monotonic() - beaten > records.HEARTBEAT_SECONDS and not stopping:
                records.beat(self.sweep)
                beaten = time.monotonic()
            states = {self._seen(job) for job in jobs}
            open_states = {"running"} if stopping else {"running", "waiting", "requeued"}
            if self.traits.is_slurm and not stopping:
                open_states.add("lost")  # a preempted job starts again: the queue decides
                if submitted.is_gone():
                    return
            if not states & open_states:
                return
            time.sleep(POLL_SECONDS)
        for job in jobs:
            self._seen(job)

    def _seen(self, job: Job) -> str:
        """The state of a job; a change is printed."""
        state = self._state(job)
        if state != self.shown.get(job.name):
            self.shown[job.name] = state
            if state in ("finished", "failed", "stopped"):
                ended = sum(one in ("finished", "failed", "stopped") for one in self.shown.values())
                say(f"Sweep {self.name}: {job.name} {state} ({ended} of {len(self.jobs)})", flush=True)
                self.ended()
            elif state in ("running", "requeued"):
                say(f"Sweep {self.name}: {job.name} {'begins' if state == 'running' else 'is requeued'}", flush=True)
        return state

    def _state(self, job: Job) -> str:
        """`waiting`, `running`, `requeued`, `lost` or its outcome, in this start of the sweep."""
        attempt = records.read_attempt(job.folder)
        if attempt.get("sweep") != self.sweep.id:
            return "waiting"
        state = str(attempt["state"])
        return "lost" if state == "running" and records.process_of(attempt).has_ended() else state

    def _record_if_lost(self, job: Job) -> None:
        if self.received or self._state(job) not in ("waiting", "running", "requeued", "lost"):
            return
        why = f": {self.why[:SHOWN]}" if self.why else ""
        Failure("lost", None, f"the launcher lost this job{why}", None).write(job.folder)
        say(f"Sweep {self.name}: {job.name} is lost", flush=True)
