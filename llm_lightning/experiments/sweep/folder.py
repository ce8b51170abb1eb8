"""The folder of a sweep, `outputs/sweeps/NAME`: who runs it, its jobs, and how their attempts ended.

`sweep.json` says whether the sweep is running: the jobs, wherever a launcher put them, watch it. Each job is a run
folder below, with two files more: `job.json`, what the job is, and `attempt.json`, how its last attempt went.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm_lightning.experiments.run_folder import process_start
from llm_lightning.experiments.run_records import Facts, read_facts
from llm_lightning.experiments.settings.nodes import leaves
from llm_lightning.experiments.sweep.identity import Identity
from llm_lightning.files.atomic import write_atomically

SWEEP = "sweep.json"
JOB = "job.json"
ATTEMPT = "attempt.json"
STOP = "stop"
"""File that stops a job when somebody makes it in the job's folder; the job saves."""
HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 300.0
"""A sweep on another host that touches `sweep.json` for this long no more has died."""

Outcome = Literal["finished", "failed", "stopped"]

_SWEEP_FACTS: Facts = {"id": str, "state": str, "pid": int, "host": str, "process_start": (str, type(None))}
_JOB_FACTS: Facts = {"settings": dict, "content": dict, "swept": list}
_ATTEMPT_FACTS: Facts = {"sweep": str, "state": str, "pid": int, "host": str, "process_start": (str, type(None))}
_JOB_REMEDY = "delete it, or the job's folder, which is then trained again"


@dataclass(frozen=True)
class Process:
    """A process, so that others can see whether it lives."""

    pid: int
    host: str
    process_start: str | None

    @classmethod
    def this(cls) -> Process:
        return cls(os.getpid(), platform.node(), process_start(os.getpid()))

    def is_of_this_host(self) -> bool:
        """Whether this host can tell if it lives."""
        return self.host == platform.node() and self.process_start is not None

    def has_ended(self) -> bool:
        """Whether it surely lives no more: False for a process of another host."""
        return self.is_of_this_host() and process_start(self.pid) != self.process_start


@dataclass(frozen=True)
class SweepRef:
    """What a job knows of its sweep, in whatever process it runs."""

    folder: str
    id: str
    """Differs for each start of the sweep: what an earlier start has left in a queue does not run."""
    head: Process
    """The process that was started by hand, and that starts the launcher."""


class Watch:
    """Tell a job when its sweep stops, or has died."""

    def __init__(self, sweep: SweepRef) -> None:
        self.sweep = sweep
        self._beat: float | None = None
        self._heard = time.monotonic()

    def is_over(self) -> bool:
        """Whether the sweep ended, stops, was started anew, or has died."""
        path = Path(self.sweep.folder, SWEEP)
        beat, state = None, {}
        with contextlib.suppress(OSError, ValueError):  # a slow network file system; the heartbeat decides
            beat, state = path.stat().st_mtime, read_facts(path, _SWEEP_FACTS, "")
        if state and (state["id"] != self.sweep.id or state["state"] != "running"):
            return True
        if self.sweep.head.is_of_this_host():
            return self.sweep.head.has_ended()
        if beat is not None and beat != self._beat:
            self._beat, self._heard = beat, time.monotonic()
        return time.monotonic() - self._heard > SILENT_SECONDS


def begin(folder: Path) -> SweepRef:
    """Declare in `sweep.json` that this process runs the sweep."""
    sweep = SweepRef(str(folder), secrets.token_hex(8), Process.this())
    _write_state(sweep, "running")
    return sweep


def end(sweep: SweepRef) -> None:
    """Declare that the sweep stops or ended: jobs that still run save and end, and none begins."""
    _write_state(sweep, "ended")


def beat(sweep: SweepRef) -> None:
    """Let jobs on other hosts see that the sweep lives."""
    with contextlib.suppress(OSError):
        os.utime(Path(sweep.folder, SWEEP))


def _write_state(sweep: SweepRef, state: str) -> None:
    content = {"id": sweep.id, "state": state, **asdict(sweep.head), "command": sys.argv}
    write_atomically(Path(sweep.folder, SWEEP), json.dumps(content, indent=2) + "\n")


# --- jobs ------------------------------------------------------------------------------------------------------------


def write_job(folder: Path, identity: Identity, words: tuple[str, ...]) -> None:
    """Write `job.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "words": list(words),
        "swept": list(identity.swept),
        "content": dict(identity.content),
        "settings": dict(identity.settings),
    }
    write_atomically(folder / JOB, json.dumps(content, indent=2, default=str) + "\n")


def read_jobs(folder: Path) -> dict[Path, Identity]:
    """The jobs in a sweep's folder, whatever their folders are called.

    A job without `job.json` is what its run says of itself in `config.json`.

    Raises:
        ValueError: naming the file, if one is damaged.
    """
    found = {}
    for path in sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink()):
        recorded = read_facts(path / JOB, _JOB_FACTS, _JOB_REMEDY)
        if recorded:
            found[path] = Identity(recorded["settings"], recorded["content"], recorded["swept"])
        elif own := read_facts(path / "config.json", {}, _JOB_REMEDY):
            found[path] = Identity(leaves(own), {}, (), is_recorded=False)
    return found


def read_words(folder: Path) -> list[str]:
    """The overrides of a job; empty if it is not recorded. Raises ValueError if the record is damaged."""
    return list(map(str, read_facts(folder / JOB, {"words": list}, _JOB_REMEDY).get("words", ())))


# --- attempts --------------------------------------------------------------------------------------------------------


def write_attempt(folder: Path, sweep: SweepRef, state: str, **facts: Any) -> None:
    """Write `attempt.json`: `state` is running, requeued, or an `Outcome`."""
    content = {"sweep": sweep.id, "state": state, **asdict(Process.this()), "time": time.time(), **facts}
    write_atomically(folder / ATTEMPT, json.dumps(content, indent=2) + "\n")


def forget_attempt(folder: Path) -> None:
    """Remove the record of a lost attempt, so that the next one is waited for."""
    (folder / ATTEMPT).unlink(missing_ok=True)


def read_attempt(folder: Path) -> dict[str, Any]:
    """The last attempt at a job; empty if there was none, or if its record is damaged."""
    try:
        return read_facts(folder / ATTEMPT, _ATTEMPT_FACTS, "")
    except ValueError:
        return {}


def process_of(attempt: Mapping[str, Any]) -> Process:
    """The process that wrote it."""
    return Process(attempt["pid"], attempt["host"], attempt["process_start"])
