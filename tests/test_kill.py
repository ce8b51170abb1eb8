"""SIGKILL at random instants; the same command each time; the end is that of the run that was never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kill_marker import SAVING, STARTING, VALIDATING
from tiny_run import assert_same

from llm_lightning import checkpoint as checkpoints
from llm_lightning.callbacks.run_logs import read_metrics

ROOT = Path(__file__).resolve().parents[1]
KILLS = ["save"] * 3 + ["validation"] * 3 + ["training"] * 10 + ["any time"] * 4
CLOCK_METRICS = {
    "train/tokens_per_second",
    "train/mfu",
    "train/peak_memory_gib",
}  # what a clock or the allocator decides
SETTINGS = [
    "tokenizer=byte",
    "model.n_layer=2",
    "model.n_embd=64",
    "model.n_head=2",
    "model.context_length=32",
    "model.dropout=0.2",
    "data.batch_size=4",
    "trainer.accumulate_grad_batches=3",
    "trainer.max_steps=1200",
    "trainer.max_epochs=-1",
    "trainer.precision=32-true",
    "trainer.val_check_interval=60",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=40",
    "trainer.enable_progress_bar=false",
    "callbacks.checkpoints.every_n_steps=20",
    "callbacks.samples.max_new_tokens=8",
    "allow_targets=[kill_marker]",
    "+callbacks.marker._target_=kill_marker.Marker",
]


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    words = random.Random(1).choices(["to be ", "or not ", "that is\n"], k=4000)
    corpus.write_text("".join(words))
    whole, killed, marker = tmp_path / "whole", tmp_path / "killed", tmp_path / "marker"
    command = [*SETTINGS, f"data.path={corpus}", f"+callbacks.marker.path={marker}"]
    marker.write_bytes(STARTING)
    assert start(command, whole).wait(timeout=600) == 0
    moments = random.Random(2)
    order = moments.sample(KILLS, len(KILLS))
    after_first_step = 0
    for kind in order:
        marker.write_bytes(STARTING)
        process = start(command, killed)
        after_first_step += kill(process, kind, marker, moments)
    assert after_first_step >= 15
    assert start(command, killed).wait(timeout=600) == 0
    assert_same_end(whole, killed)


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *command, f"hydra.run.dir={folder}"],
            env=environment,
            cwd=folder.parent,
            stdout=output,
            stderr=output,
        )


def kill(process: subprocess.Popen[bytes], kind: str, marker: Path, moments: random.Random) -> bool:
    """Kill at a moment of this kind; returns whether the process had made a step."""
    if kind == "any time":
        time.sleep(moments.uniform(0, 8))
    else:
        wait_for(process, lambda: marker.read_bytes() != STARTING)
        time.sleep(moments.uniform(0, 0.5))
        if kind == "save":
            wait_for(process, lambda: marker.read_bytes() == SAVING)
            time.sleep(moments.uniform(0, 0.005))  # a save takes about 5 ms
        elif kind == "validation":
            wait_for(process, lambda: marker.read_bytes() == VALIDATING)
            time.sleep(moments.uniform(0, 0.02))
    stepped = marker.read_bytes() != STARTING
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run ended before the kill ({kind})"
    return stepped


def wait_for(process: subprocess.Popen[bytes], condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.0002)


def assert_same_end(whole: Path, killed: Path) -> None:
    one = checkpoints.load(whole / "checkpoints" / "last.ckpt")
    other = checkpoints.load(killed / "checkpoints" / "last.ckpt")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "task_module", "global_step", "position"):
        assert_same(one[key], other[key], key)
    assert (whole / "checkpoints" / "best.ckpt").is_file()
    best = [checkpoints.read_header(run / "checkpoints" / "best.ckpt") for run in (whole, killed)]
    assert best[0]["step"] == best[1]["step"]
    metrics = [read_metrics(run / "metrics.csv") for run in (whole, killed)]
    for name in metrics[0].keys() - CLOCK_METRICS:
        assert metrics[0][name] == metrics[1][name], name
    assert [step for step, _ in metrics[1]["train/loss"]] == list(range(1200))
    assert len(metrics[1]["train/loss_epoch"]) >= 1
    assert tensorboard(whole) == tensorboard(killed)
    assert (whole / "samples.md").read_text() == (killed / "samples.md").read_text()
    assert not list(killed.rglob(".*.tmp"))


def tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = set(events.Tags()["scalars"]) - CLOCK_METRICS
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in sorted(names)}
