"""What SLURM says of the job that this process is part of, and the job's requeueing. Standard library only."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime

SECONDS = 20.0
"""Seconds for SLURM's answer: after SIGTERM it gives a job 30 by default (`KillWait`)."""
ANNOUNCED_SECONDS = {"SIGUSR1": 3660.0}
"""Seconds before a job's time limit in which a signal announces it; nobody records what `sbatch --signal=USR1@3600`
asked for, which may come 60 s earlier. Other signals:"""
NEAR_SECONDS = 180.0
BY_SLURM = "SLURM does so itself"
RUNNING = ("RUNNING", "SIGNALING")  # the latter while SLURM sends a signal of `sbatch --signal`


def is_job() -> bool:
    """Whether SLURM started this process, and nothing else requeues it: submitit does so itself."""
    return "SLURM_JOB_ID" in os.environ and "SUBMITIT_EXECUTOR" not in os.environ


def requeue(signum: int) -> str:
    """Requeue this process's job, if it was asked to end by its time limit or by preemption; say what was done.

    Args:
        signum: the signal that asked.
    """
    job = job_id()
    shown = show(job)
    cause = cause_of(shown, signum)
    refused = why_not(shown, cause)
    if refused == BY_SLURM:
        return f"SLURM job {job} is requeued by SLURM itself"
    refused = refused or _refused_by_slurm(job)
    return f"SLURM job {job} is requeued: {cause}" if refused is None else not_requeued(refused)


def not_requeued(why: str = "it made no step since its start; give it more time (sbatch --time)") -> str:
    """Say so, and why: without a step, the next start would not get further either; empty without a job."""
    return f"SLURM job {job_id()} is not requeued: {why}" if is_job() else ""


def _refused_by_slurm(job: str) -> str | None:
    said = _asked("requeue", job)
    return None if said is not None and not said[0] else f"scontrol says: {said[1] if said else 'nothing'}"


def cause_of(shown: Mapping[str, str], signum: int) -> str | None:
    """`time limit` or `preemption`, if that is why SLURM ends the job; None: a person, or nobody knows.

    Args:
        shown: the fields of `scontrol show job`.
    """
    if shown.get("Reason") == "TimeLimit":
        return "time limit"
    if shown.get("JobState") not in RUNNING:
        return None
    if is_preempted(shown):
        return "preemption"
    announced = ANNOUNCED_SECONDS.get(signal.Signals(signum).name, NEAR_SECONDS)
    return "time limit" if _seconds_left(shown) < announced else None


def is_preempted(shown: Mapping[str, str]) -> bool:
    """Whether SLURM has asked the job to end in its grace time; one that does so, SLURM does not requeue."""
    return shown.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")


def why_not(shown: Mapping[str, str], cause: str | None) -> str | None:
    """Why a job with these fields is not to be requeued; None if it is."""
    state = shown.get("JobState")
    if state is None:
        return "SLURM does not say why it ends"
    if "CANCELLED" in (state, shown.get("Reason")):
        return "it was cancelled"
    if shown.get("Restarts", "0") != os.environ.get("SLURM_RESTART_COUNT", "0") or state in ("PENDING", "REQUEUED"):
        return BY_SLURM
    if cause is None:
        who = "a person sent the signal" if state in RUNNING else "it was cancelled, or nobody says why it ends"
        return f"{who} (state {state}, reason {shown.get('Reason')}, end {shown.get('EndTime')})"
    return "it was submitted with --no-requeue" if shown.get("Requeue") == "0" else None


def show(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`; empty if there is no answer."""
    said = _asked("show", "job", job)
    return fields_of(said[1]) if said is not None and not said[0] else {}


def fields_of(text: str) -> dict[str, str]:
    """`Key=value` words; of several with one key, the first."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"(\w[\w/:&-]*)=(\S*)", text):
        found.setdefault(key, value)
    return found


def job_id() -> str:
    """The number of this process's job, in an array that of its part."""
    part = os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ["SLURM_JOB_ID"] if part is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{part}"


def _seconds_left(shown: Mapping[str, str]) -> float:
    """Seconds until the time limit; without one, `EndTime` is no time."""
    try:
        return datetime.fromisoformat(shown["EndTime"]).timestamp() - time.time()
    except (KeyError, ValueError):
        return float("inf")


def _asked(*words: str) -> tuple[int, str] | None:
    """Exit code and words of `scontrol`; None if it is missing or does not answer."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, " ".join((done.stderr + done.stdout).split())
