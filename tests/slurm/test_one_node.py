"""The trials of `one_node.py`, where SLURM is installed and may be started."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import missing
from one_node import TRIALS, run_trials


@pytest.mark.soak
@pytest.mark.skipif(missing() is not None, reason=f"no SLURM of its own: {missing()}")
def test_jobs_are_requeued_by_their_cause_and_end_bitwise_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        jobs = run_trials(list(TRIALS), tmp_path, minutes=2, show=lambda row: print(row, flush=True))
    assert [job.row() for job in jobs if job.result.startswith("WRONG")] == []
