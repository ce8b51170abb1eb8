"""A mixture 70 / 20 / 10 over three sources, killed ten times, ends as one that was not; on two processes too."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import Forked
from kill_marker import STARTING
from test_kill import PRETRAINING, SHARED, assert_same_end, kill, said, start, wait_for

from llm_lightning.files.metrics_csv import read_metrics

KILLS = ["save"] * 2 + ["validation"] * 2 + ["training"] * 4 + ["any time"] * 2
WEIGHTS = {"web": 0.7, "books": 0.2, "code": 0.1}
SIZES = {"web": 30_000, "books": 12_000, "code": 1_000}
STEPS = 400
SELDOM = ["trainer.val_check_interval=150", "trainer.limit_val_batches=4", "callbacks.samples=null"]
"""A validation takes longer than ten steps."""
DDP = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for number, (name, size) in enumerate(SIZES.items()):
        (tmp_path / f"{name}.txt").write_text("".join(random.Random(number).choices("abcdef .", k=size)))
    sources = [f"{{name: {name}, path: {tmp_path}/{name}.txt, weight: {weight}}}" for name, weight in WEIGHTS.items()]
    mixture = [f"data.mixture=[{', '.join(sources)}]", f"trainer.max_steps={STEPS}"]
    return [*SHARED, *PRETRAINING, *SELDOM, *mixture, f"+callbacks.marker.path={tmp_path / 'marker'}"]


@pytest.mark.slow
def test_ten_kills(tmp_path: Path, command: list[str]) -> None:
    whole, killed, marker = tmp_path / "whole", tmp_path / "killed", tmp_path / "marker"
    marker.write_bytes(STARTING)
    assert start(command, whole, forked=True).wait(timeout=600) == 0, said(whole)
    moments, after_first_step = random.Random(3), 0
    for kind in moments.sample(KILLS, len(KILLS)):
        marker.write_bytes(STARTING)
        after_first_step += kill(start(command, killed, forked=True), kind, marker, moments)
    assert start(command, killed, forked=True).wait(timeout=600) == 0, said(killed)
    assert after_first_step >= 7
    assert_same_end(whole, killed, STEPS)
    assert_shares(killed)


@pytest.mark.slow
def test_ten_kills_of_two_processes(tmp_path: Path, command: list[str]) -> None:
    whole, killed, marker = tmp_path / "whole", tmp_path / "killed", tmp_path / "marker"
    marker.write_bytes(STARTING)
    for process in start_two([*command, *DDP], whole):
        assert process.wait(timeout=600) == 0
    moments = random.Random(4)
    for _ in KILLS:
        marker.write_bytes(STARTING)
        both = start_two([*command, *DDP], killed)
        wait_for(both[0], lambda: marker.read_bytes() != STARTING)
        time.sleep(moments.uniform(0, 0.5))
        for process in moments.sample(both, 2):
            process.send_signal(signal.SIGKILL)
        codes = [process.wait(timeout=60) for process in both]
        assert -signal.SIGKILL in codes, "the run ended before the kill"
    for process in start_two([*command, *DDP], killed):
        assert process.wait(timeout=600) == 0
    assert_same_end(whole, killed, STEPS)
    assert_shares(killed)


def start_two(arguments: list[str], run: Path) -> list[Forked]:
    """A run in two processes, each told its rank, as by a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    words = [*arguments, f"hydra.run.dir={run}"]
    return [Forked(words, run.parent, environment={**shared, "LOCAL_RANK": rank}) for rank in "01"]


def assert_shares(run: Path) -> None:
    """Every whole epoch took its shares, by the counts that were logged."""
    facts = json.loads((run / "summary.json").read_text())["data"]["mixture"]
    metrics = read_metrics(run / "metrics.csv")
    n_windows = sum(source["samples"] for source in facts.values())
    n_epochs = len(metrics["mixture/web"])
    assert n_epochs >= 3
    for name, weight in WEIGHTS.items():
        for _, count in metrics[f"mixture/{name}"][: n_epochs - 1]:
            assert abs(count / n_windows - weight) < 0.01
