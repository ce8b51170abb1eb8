"""What a run keeps to itself: advice of libraries that does not hold here."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tiny_run import SETTINGS, fit_here


def test_no_advice_about_the_logging_interval(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 60)
    short = [f"data.path={tmp_path / 'a.txt'}", "trainer.log_every_n_steps=100", f"hydra.run.dir={tmp_path / 'run'}"]
    assert fit_here([*SETTINGS, *short, "callbacks.samples=null"]).code == 0
    assert [str(one.message) for one in recwarn if "logging interval" in str(one.message)] == []
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "3"], "the first and the last step are logged"
