"""Which jobs are requeued, from what `scontrol` of SLURM 22.05 showed at each end of a job; a real one: tests/slurm."""

from __future__ import annotations

import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from llm_lightning import slurm

# As shown by a SLURM of one node (spaces in place of line breaks, fields that nobody reads left out).
BY_LIMIT = "JobState=COMPLETING Reason=TimeLimit Dependency=(null) Requeue=1 Restarts=0 TimeLimit=00:01:00"
BY_SCANCEL = (
    "JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=0 TimeLimit=00:03:00 PreemptTime=None"
)
IN_GRACE_TIME = "JobState=RUNNING Reason=None Requeue=1 Restarts=0 TimeLimit=00:05:00 PreemptTime=2026-11-27T17:24:06"
CANCELLED_IN_GRACE_TIME = IN_GRACE_TIME.replace("RUNNING", "COMPLETING")
PREEMPTED = "JobState=COMPLETING Reason=None Requeue=1 Restarts=1 TimeLimit=00:05:00 EndTime=2026-11-27T17:29:06"


def running(seconds: int, state: str = "RUNNING") -> str:
    """A job that has this long to run when `shown` reads it."""
    return (
        f"JobState={state} Reason=None Requeue=1 Restarts=0 TimeLimit=10:00:00 EndTime={{{seconds}}} PreemptTime=None"
    )


def shown(text: str) -> dict[str, str]:
    """The fields, with the moment in place of the seconds until then."""
    fields = slurm.fields_of(text)
    end = fields.get("EndTime", "")
    if end.startswith("{"):
        fields["EndTime"] = datetime.fromtimestamp(time.time() + int(end[1:-1])).isoformat(timespec="seconds")
    return fields


CASES = {
    "limit": (BY_LIMIT, signal.SIGTERM, "time limit", None),
    "grace time": (IN_GRACE_TIME, signal.SIGTERM, "preemption", None),
    "scancel in grace time": (CANCELLED_IN_GRACE_TIME, signal.SIGTERM, None, "it was cancelled, or nobody says why"),
    "preempted": (PREEMPTED, signal.SIGTERM, None, "SLURM does so itself"),
    "scancel": (BY_SCANCEL, signal.SIGTERM, None, "it was cancelled, or nobody says why"),
    "cancelled": ("JobState=CANCELLED Reason=TimeLimit", signal.SIGTERM, "time limit", "it was cancelled"),
    "no answer": ("", signal.SIGTERM, None, "SLURM does not say why it ends"),
    "USR1@300": (running(330), signal.SIGUSR1, "time limit", None),
    "USR1@300, being sent": (running(330, "SIGNALING"), signal.SIGUSR1, "time limit", None),
    "TERM@120": (running(130), signal.SIGTERM, "time limit", None),
    "TERM by a person": (running(600), signal.SIGTERM, None, "a person sent the signal"),
    "USR1 by a person": (running(7200), signal.SIGUSR1, None, "a person sent the signal"),
    "no limit": ("JobState=RUNNING Reason=None EndTime=Unknown", signal.SIGUSR1, None, "a person sent the signal"),
    "--no-requeue": (BY_LIMIT.replace("Requeue=1", "Requeue=0"), signal.SIGTERM, "time limit", "--no-requeue"),
}


@pytest.mark.parametrize("name", CASES)
def test_only_the_time_limit_and_preemption_requeue(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    text, signum, cause, refused = CASES[name]
    fields = shown(text)
    assert slurm.cause_of(fields, signum) == cause
    words = slurm.why_not(fields, cause)
    assert words is None if refused is None else refused in str(words)


def test_a_job_that_was_requeued_before_counts_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    again = slurm.fields_of(BY_LIMIT.replace("Restarts=0", "Restarts=2"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert slurm.why_not(again, "time limit") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.why_not(again, "time limit") == "SLURM does so itself"


def test_a_part_of_an_array_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm.job_id() == "8"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert slurm.job_id() == "7_1"


def test_without_slurm_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.not_requeued() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm.not_requeued("why") == "SLURM job 8 is not requeued: why"
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")  # it requeues its jobs itself
    assert slurm.not_requeued("why") == ""


def test_a_scontrol_that_is_missing_or_hangs_requeues_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.requeue(signal.SIGTERM) == "SLURM job 8 is not requeued: SLURM does not say why it ends"
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(slurm, "SECONDS", 0.1)
    assert slurm.requeue(signal.SIGTERM) == "SLURM job 8 is not requeued: SLURM does not say why it ends"
