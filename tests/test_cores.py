"""The cores that a process may use, with control groups written as files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_lightning import cores


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def test_version_2_counts_the_tightest_group_above(tmp_path: Path) -> None:
    own = write(tmp_path / "own", "0::/pods/job/step")
    write(tmp_path / "pods" / "cpu.max", "400000 100000")
    write(tmp_path / "pods" / "job" / "cpu.max", "150000 100000")
    write(tmp_path / "pods" / "job" / "step" / "cpu.max", "max 100000")
    assert cores.quota(tmp_path, own) == 1.5
    write(tmp_path / "pods" / "cpu.max", "50000 100000")
    assert cores.quota(tmp_path, own) == 0.5


def test_version_1_and_a_group_that_only_the_host_sees(tmp_path: Path) -> None:
    own = write(tmp_path / "own", "3:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:cpuset:/\n0::/")
    assert cores.quota(tmp_path, own) is None
    write(tmp_path / "cpu,cpuacct" / "cpu.cfs_period_us", "50000")
    quota = write(tmp_path / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1")
    assert cores.quota(tmp_path, own) is None
    quota.write_text("100000\n")
    assert cores.quota(tmp_path, own) == 2


def test_nothing_readable_is_no_limit(tmp_path: Path) -> None:
    assert cores.quota(tmp_path, tmp_path / "missing") is None
    assert cores.quota(tmp_path, write(tmp_path / "own", "0::/../..")) is None
    write(tmp_path / "cpu.max", "what?")
    assert cores.quota(tmp_path, tmp_path / "own") is None


@pytest.mark.parametrize(
    ("limit", "slurm", "expected"),
    [(None, None, 8), (2.5, None, 3), (0.2, None, 1), (None, "4", 4), (3.0, "4", 3), (64.0, "16", 8), (None, "", 8)],
)
def test_the_smallest_counts(
    limit: float | None, slurm: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(cores, "quota", lambda: limit)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert cores.cores() == expected
