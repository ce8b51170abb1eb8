"""The cores that this process may use: by affinity, by a container's quota, by SLURM. Standard library only."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_V1, _V2 = ("cpu", "cpu,cpuacct", "cpuacct,cpu"), ("", "unified")
"""Folders below `CGROUPS` where the two versions of control groups are mounted."""


def cores() -> int:
    """The smallest of what affinity, the CPU quota and SLURM's allotment to a task (`--cpus-per-task`) allow."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    limit = quota()
    if limit is not None:
        # Rounded up, as Java and Go do: two threads at a quota of 1.5 do more than one.
        found.append(math.ceil(limit))
    allotted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if allotted.isdigit():
        found.append(int(allotted))
    return max(1, min(found))


def quota(mounted: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """The CPUs that the control groups of this process allow (`docker --cpus`, Kubernetes' limits); None: no limit."""
    limits = [limit for folder in _groups(mounted, own) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _groups(mounted: Path, own: Path) -> Iterator[Path]:
    """The groups of this process and all above them: each may have a limit of its own.

    A container may see the host's name of its group, which does not exist below its own mount; the mount itself is
    then the group.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for place in _V1 if controllers else _V2:
            for depth in range(len(parts), -1, -1):
                yield mounted.joinpath(place, *parts[:depth])


def _limit(group: Path) -> float | None:
    """The limit that one group sets, in CPUs; version 2: "150000 100000" or "max 100000"; version 1: -1 for none."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").is_file():
            share, period = (group / "cpu.max").read_text().split()
            return None if share == "max" else int(share) / int(period)
        share, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(share) / int(period) if int(share) > 0 else None
    return None
