"""Run folders as runs of every status leave them, made without training.

`python tests/made_runs.py FOLDER 1000 [--yaml]` makes that many, to time `llm-lightning runs`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_folder import process_start

HOST = "another-host"
NOBODY = 2**22 + 1
"""A pid above those that Linux gives."""
MADE = ("running", "foreign", "finished", "stopped", "failed", "died", "unreadable")
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "run_name": None,
    "resume": None,
    "monitor": "val/loss",
    "monitor_mode": "min",
    "model": {"context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 64, "dropout": 0.0},
    "tokenizer": {"name": "bpe", "vocab_size": 512},
    "data": {"_target_": "llm_lightning.data.instruction.InstructionDataModule", "path": None, "batch_size": 8},
    "optimizer": {"_target_": "llm_lightning.optim.adamw.AdamWConfig", "lr": 0.001, "betas": [0.9, 0.95]},
    "scheduler": {"_target_": "llm_lightning.optim.schedules.WarmupCosineConfig", "min_lr": 1e-05},
    "lora": {},
    "trainer": {"max_epochs": 2, "max_steps": -1, "log_every_n_steps": 10, "devices": 1},
    "callbacks": {"checkpoints": {"every_n_steps": 500, "keep": 2}, "samples": {"prompts": ["to be"]}, "plots": None},
    "task": {"_target_": "llm_lightning.tasks.sft.SFTModule"},
}


def settings(**changes: Any) -> dict[str, Any]:
    """The settings of a run; `optimizer__lr=1` changes `optimizer.lr`."""
    made = deepcopy(SETTINGS)
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = made
        for parent in parents:
            node = node[parent]
        node[last] = value
    return made


def write_settings(folder: Path, content: Mapping[str, Any], *, as_json: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()
    (folder / "config.yaml").write_text(yaml.dump(dict(content), sort_keys=False))
    if as_json:
        (folder / "config.json").write_text(json.dumps(content))


def write_command(folder: Path, total_steps: int) -> None:
    command = {"folder": "/home", "config_dir": None, "overrides": [], "places": {}, "total_steps": total_steps}
    (folder / "command.json").write_text(json.dumps(command))


def write_metrics(folder: Path, losses: list[float], every: int = 10) -> None:
    """A row every so many steps; the validation loss is logged with the last step of each epoch of two rows."""
    rows = ["step,train/loss,val/loss,lr"]
    rows += [f"{index * every},{loss + 1},{loss if index % 2 else ''},0.001" for index, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def write_summary(folder: Path, loss: float = 1.5, **changes: Any) -> None:
    summary = {
        "finished": True,
        "stopped_by": None,
        "task": "sft",
        "ended": "2026-11-26T22:00:00+00:00",
        "steps": 100,
        "total_steps": 100,
        "seconds": 61.5,
        "monitor": "val/loss",
        "best_value": loss,
        "metrics": {"val/loss": loss + 0.01, "test/accuracy": 0.75},
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_owner(folder: Path, pid: int, host: str | None = None, started: str = "2026-11-26T22:00:00+00:00") -> None:
    owner = {"pid": pid, "host": host or platform.node(), "process_start": process_start(pid) or "1"}
    (folder / "owner.json").write_text(json.dumps(owner | {"started": started, "command": ["train.py"]}))


def write_checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"step_{step:08d}.ckpt").touch()


def make_run(folder: Path, status: str, *, as_json: bool = True, **changes: Any) -> None:
    """A run of that status, with the settings `changes`."""
    write_settings(folder, settings(**changes), as_json=as_json)
    write_command(folder, 100)
    write_metrics(folder, [3.0, 2.5, 2.25, 2.0, 1.75, 1.875])
    if status in ("finished", "unreadable"):
        write_metrics(folder, [3.0] * 10)
        write_summary(folder)
    if status in ("running", "died"):
        write_owner(folder, os.getppid() if status == "running" else NOBODY)
    if status == "foreign":
        write_owner(folder, 7, HOST)
    if status == "failed":
        Failure("error", "ValueError", "loss is not finite at step 51", 2).write(folder)
    if status in ("stopped", "died", "failed"):
        write_checkpoint(folder, 53)
    if status == "unreadable":
        (folder / "summary.json").write_text('{"finished": tru')


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("--yaml", action="store_true", help="no config.json, as earlier versions")
    args = parser.parse_args()
    for index in range(args.number):
        lr, seed = 10.0 ** -(index % 5 + 2), index // 5
        folder = args.folder / f"study_{index % 10}" / f"lr_{lr:g}-seed_{seed}"
        make_run(folder, MADE[index % len(MADE)], as_json=not args.yaml, optimizer__lr=lr, seed=seed)


if __name__ == "__main__":
    main()
