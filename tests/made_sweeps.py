"""Folders of sweeps as the sweeper leaves them, made without training.

`python tests/made_sweeps.py FOLDER` makes one of 12 jobs, extended after failures: to look at its report.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from made_runs import NOBODY, settings, write_checkpoint, write_command, write_owner, write_settings, write_summary

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.settings.nodes import leaves

VERSIONS = {"python": "3.11.7", "llm-lightning": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6"}


def make_job(
    folder: Path,
    status: str,
    loss: float = 1.5,
    *,
    rows: int = 0,
    summary: Mapping[str, Any] | None = None,
    **changes: Any,
) -> None:
    """One job; `optimizer__lr=1` changes a setting.

    Args:
        status: also `waiting`: it has not begun.
        loss: its best validation loss.
        rows: of its metrics; 0: it has no curves.
    """
    content = settings(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    job = {"words": [*words, "run_name=study"], "swept": [key.replace("__", ".") for key in changes], "content": {}}
    (folder / "job.json").write_text(json.dumps(job | {"settings": leaves(content)}))
    if status == "waiting":
        return
    write_settings(folder, content)
    write_command(folder, 10 * max(rows, 1))
    if rows:
        write_curves(folder, loss, rows if status == "finished" else rows // 2, changes.get("seed", 1))
    if status == "finished":
        steps = 10 * max(rows, 1)
        extra: dict[str, Any] = {
            "steps": steps,
            "total_steps": steps,
            "item": "token",
            "tokens": 2048 * steps,
            "tokens_per_second": 2500.0 + 100 * loss,
        }
        extra |= {"versions": VERSIONS, "git": {"commit": "6f0c1d2", "dirty": False}, "device": "cpu: a processor"}
        extra |= {"lineage": {"data": "ab" * 32, "parent": None}, "metrics": _metrics(loss), "best_value": loss}
        write_summary(folder, loss, **extra | dict(summary or {}))
    if status == "failed":
        Failure("error", "ValueError", "non-finite loss (nan) after 51 updates", 2).write(folder)
    if status in ("died", "running"):
        write_owner(folder, NOBODY if status == "died" else os.getppid())
        write_checkpoint(folder, 53)
    if status == "unreadable":
        (folder / "summary.json").write_text('{"finished": tru')


def _metrics(loss: float) -> dict[str, float]:
    accuracy = 1 / (1 + loss / 4)
    return {
        "val/loss": loss + 0.01,
        "val/accuracy": accuracy - 0.01,
        "test/accuracy": accuracy,
        "test/accuracy_low": accuracy - 0.05,
        "test/accuracy_high": accuracy + 0.04,
        "test/loss": loss + 0.05,
    }


def write_curves(folder: Path, loss: float, rows: int, seed: int) -> None:
    """Training loss in every row, validation in every tenth and the last; the last is `loss`."""
    noise = random.Random(f"{loss} {seed}")
    lines = ["step,train/loss,val/loss,lr,train/grad_norm,train/peak_memory_gib"]
    for row in range(rows):
        now = loss + 3 * (math.exp(-6 * row / rows) - math.exp(-6 * (rows - 1) / rows))
        validation = f"{now:.6f}" if row % 10 == 9 or row == rows - 1 else ""
        training, rate = now - 0.1 + noise.gauss(0, 0.15), 1e-3 * math.cos(row / rows * 1.5)
        lines.append(
            f"{row * 10},{training:.6f},{validation},{rate:.8f},{1 + noise.random():.5f},{0.5 + row / rows / 9:.4f}"
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_sweep(folder: Path, *words: str, state: str = "ended") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"id": "1", "state": state, "pid": 1, "host": "h", "process_start": None}
    (folder / "sweep.json").write_text(json.dumps(content | {"command": ["/home/train.py", "-m", *words]}))


def make_study(folder: Path, rows: int = 200) -> None:
    """12 jobs: three rates by two widths by two seeds, of which one failed, one was killed and one waits."""
    write_sweep(folder, "optimizer.lr=1e-4,1e-3,1e-2", "model.n_embd=32,64", "seed=1,2", "run_name=study")
    for rate, loss in ((1e-4, 2.1), (1e-3, 1.5), (1e-2, 1.8)):
        for width in (32, 64):
            for seed in (1, 2):
                name = f"lr_{rate:g}-n_embd_{width}-seed_{seed}"
                status = {"lr_0.01-n_embd_32-seed_2": "failed", "lr_0.01-n_embd_64-seed_1": "died",
                          "lr_0.01-n_embd_64-seed_2": "waiting"}.get(name, "finished")  # fmt: skip
                value = loss - width / 400 + 0.03 * seed + random.Random(name).gauss(0, 0.01)
                make_job(folder / name, status, value, rows=rows, optimizer__lr=rate, model__n_embd=width, seed=seed)


if __name__ == "__main__":
    make_study(Path(sys.argv[1]))
