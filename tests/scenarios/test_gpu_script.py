"""The script for a machine with a GPU, rehearsed on this CPU with tiny sizes: every part ends, and is in the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT

SCRIPT = ROOT / "tests" / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_gpu_script_rehearses_on_a_cpu(tmp_path: Path, data_dir: Path) -> None:
    pytest.importorskip("trl")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLM_LIGHTNING_DATA": str(data_dir)}
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results) == ["machine", "tests", "training", "sft", "dpo", "generation", "lora", "runs"]
    assert results["runs"]["pretraining"]["two sittings equal one to the bit"]
    for part in ("training", "lora"):
        assert all(one["tokens_per_second"] > 0 for one in results[part].values())
    table = (tmp_path / "gpu.md").read_text()
    assert results["machine"]["date"] in table.splitlines()[0]
    n_rows = sum(len(of_part) for part, of_part in results.items() if part != "machine")
    assert len(table.splitlines()) == 4 + n_rows
    assert "failed" not in table


@pytest.mark.slow
def test_what_has_no_time_left_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--parts", "training", "--minutes", "0", "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    results = json.loads((tmp_path / "gpu.json").read_text())["training"]
    assert set(results) >= {"ours", "bare_loop_compiled"}
    assert all(one == {"exit_code": 124, "says": "not started: the time is over"} for one in results.values())
