"""The book's recipes reach the book's losses, on the book's text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_lightning.callbacks.run_logs import read_metrics

ROOT = Path(__file__).resolve().parents[1]


def run(experiment: str, data_dir: Path, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of the experiment; its checkpoints (2 GB each) are removed."""
    arguments = [f"experiment={experiment}", f"data.path={data_dir / 'the-verdict.txt'}", f"hydra.run.dir={folder}"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["parameters"]["total"] == 162_419_712
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    return read_metrics(folder / "metrics.csv")


@pytest.mark.slow
def test_chapter_5(data_dir: Path, tmp_path: Path) -> None:
    """Published 0.569 / 6.373; the author accepts below 1 / 7; other seeds gave up to 1.08."""
    curves = run("book/ch05", data_dir, tmp_path / "run")
    assert [step for step, _ in curves["train/loss"]] == list(range(90))
    assert curves["train/eval_loss"][-1][1] < 1.2
    assert curves["val/loss"][-1][1] < 7
    assert {lr for _, lr in curves["lr"]} == {4e-4}


@pytest.mark.slow
def test_appendix_d(data_dir: Path, tmp_path: Path) -> None:
    """Published 1.312 / 6.158, and the learning rate at four steps."""
    curves = run("book/appendix_d", data_dir, tmp_path / "run")
    assert curves["train/eval_loss"][-1][1] < 1.5
    assert curves["val/loss"][-1][1] < 7
    rates = dict(curves["lr"])
    published = {0: 1e-5, 26: 9.633e-4, 27: 1e-3, 134: 1.0209e-5}
    assert {step: rates[step] for step in published} == pytest.approx(published, rel=1e-4)
