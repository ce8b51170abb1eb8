"""The report while a sweep runs: how often it is written, what an error costs, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_sweeps import make_job

from llm_lightning.experiments.report import watching, writing
from llm_lightning.experiments.report.watching import SweepReport


class Clock:
    """A clock that only moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watching, "time", clock)
    return clock


def test_reports_take_at_most_a_tenth_of_the_sweep(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = []

    def write(folders: list[Path]) -> writing.Written:
        took.append(3.0 + len(took))
        clock.now += took[-1]
        return writing.Written(folders[0], [], [])

    monkeypatch.setattr(writing, "write_report", write)
    report = SweepReport(tmp_path)
    for _ in range(1000):
        clock.now += 1.0
        report.job_ended()
        assert not took or sum(took) <= 0.1 * (clock.now - 100.0) + 1, "as much as was expected"
    assert len(took) > 8, "and it is used"
    assert report.write() == tmp_path / "report.html"


def test_an_error_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_job(tmp_path / "seed_1", "finished", seed=1)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "studies_of", fail)
        report = SweepReport(tmp_path)
        assert report.write() is None
        assert report.write() is None
    assert capsys.readouterr().err == "no report: RuntimeError: no font at all\n"
    assert report.write() == tmp_path / "report.html"


@pytest.mark.slow
def test_a_report_imports_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_job(tmp_path / f"seed_{seed}", "finished", rows=10, seed=seed)
    code = (
        "import sys; from pathlib import Path; from llm_lightning.experiments.report.watching import SweepReport; "
        f"assert SweepReport(Path({str(tmp_path)!r})).write(); "
        "print({'torch', 'tensorflow', 'lightning', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
