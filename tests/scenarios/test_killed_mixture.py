"""A mixture 70 / 20 / 10 over three sources, killed ten times, ends as one that was not; on two processes too.

Of text and of records, in batches of records of similar length.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from kill_marker import STARTING
from test_kill import PRETRAINING, SHARED, assert_same_end, kill, said, start, wait_for

from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.tokenizers.build import build_tokenizer

KILLS = ["save"] * 2 + ["validation"] * 2 + ["training"] * 4 + ["any time"] * 2
WEIGHTS = {"web": 0.7, "books": 0.2, "code": 0.1}
SIZES = {"web": 30_000, "books": 12_000, "code": 1_000}
STEPS = 400
RECORDS = {"web": 120, "books": 90, "code": 12}
RECORD_STEPS = 120
SFT = [
    "task=sft",
    "data.template='{instruction}\\n{response}'",
    "data.bucket=true",
    "data.packing=false",
    "model.context_length=64",
    "model.dropout=0.2",
    "trainer.check_val_every_n_epoch=3",
    "callbacks.samples=null",
]
SELDOM = ["trainer.val_check_interval=150", "trainer.limit_val_batches=4", "callbacks.samples=null"]
"""A validation takes longer than ten steps."""
DDP = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for number, (name, size) in enumerate(SIZES.items()):
        (tmp_path / f"{name}.txt").write_text("".join(random.Random(number).choices("abcdef .", k=size)))
    sources = [f"{{name: {name}, path: {tmp_path}/{name}.txt, weight: {weight}}}" for name, weight in WEIGHTS.items()]
    mixture = f"data.mixture=[{', '.join(sources)}]"
    return [*SHARED, *PRETRAINING, *SELDOM, mixture, f"+callbacks.marker.path={tmp_path / 'marker'}"]


@pytest.fixture
def of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for number, (name, size) in enumerate(RECORDS.items()):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdef ", k=draw.randint(1, 40))) for _ in range(size)]
        rows = [{"instruction": f"{name} {at}", "output": f"{word}."} for at, word in enumerate(words)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources = [f"{{name: {one['name']}, path: {one['path']}, weight: {one['weight']}}}" for one in entries(tmp_path)]
    mixture = f"data.mixture=[{', '.join(sources)}]"
    callbacks = [f"+callbacks.marker.path={tmp_path / 'marker'}", "callbacks.responses=null"]
    callbacks += ["+callbacks.seen._target_=kill_marker.Seen", f"+callbacks.seen.path={tmp_path / 'seen'}"]
    return [*SHARED, *SFT, mixture, *callbacks]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [{"name": name, "path": f"{folder}/{name}.jsonl", "weight": weight} for name, weight in WEIGHTS.items()]


@pytest.mark.soak
def test_ten_kills(tmp_path: Path, command: list[str]) -> None:
    assert_shares(killed_often(tmp_path, command, KILLS, STEPS))


@pytest.mark.soak
def test_ten_kills_of_two_processes(tmp_path: Path, command: list[str]) -> None:
    assert_shares(killed_often_in_two(tmp_path, command, len(KILLS), STEPS))


@pytest.mark.slow
def test_ten_kills_with_records(tmp_path: Path, of_records: list[str]) -> None:
    run = killed_often(tmp_path, of_records, KILLS, STEPS)
    assert_shares(run)
    assert_shares_seen(run, tmp_path)


@pytest.mark.slow
def test_three_kills_of_two_processes_with_records(tmp_path: Path, of_records: list[str]) -> None:
    run = killed_often_in_two(tmp_path, of_records, 3, RECORD_STEPS)
    assert_shares(run)
    assert_shares_seen(run, tmp_path)


def killed_often(folder: Path, command: list[str], kills: list[str], steps: int) -> Path:
    """The run that was killed, after its end is found to be that of one that was not."""
    command = [*command, f"trainer.max_steps={steps}"]
    whole, killed, marker = folder / "whole", folder / "killed", folder / "marker"
    marker.write_bytes(STARTING)
    assert start(command, whole, forked=True).wait(timeout=600) == 0, said(whole)
    moments, after_first_step = random.Random(3), 0
    (folder / "seen").unlink(missing_ok=True)  # those of the whole run
    for kind in moments.sample(kills, len(kills)):
        marker.write_bytes(STARTING)
        after_first_step += kill(start(command, killed, forked=True), kind, marker, moments)
    assert start(command, killed, forked=True).wait(timeout=600) == 0, said(killed)
    assert after_first_step >= 0.7 * len(kills)
    assert_same_end(whole, killed, steps)
    return killed


def killed_often_in_two(folder: Path, command: list[str], kills: int, steps: int) -> Path:
    """The same in two processes, one of them or both killed at a moment in training."""
    command = [*command, *DDP, f"trainer.max_steps={steps}"]
    whole, killed, marker = folder / "whole", folder / "killed", folder / "marker"
    marker.write_bytes(STARTING)
    for process in start_two(command, whole):
        assert process.wait(timeout=600) == 0
    moments = random.Random(4)
    (folder / "seen").unlink(missing_ok=True)
    for _ in range(kills):
        marker.write_bytes(STARTING)
        both = start_two(command, killed)
        wait_for(both[0], lambda: marker.read_bytes() != STARTING)
        time.sleep(moments.uniform(0, 0.5))
        for process in moments.sample(both, 2):
            process.send_signal(signal.SIGKILL)
        codes = [process.wait(timeout=60) for process in both]
        assert -signal.SIGKILL in codes, "the run ended before the kill"
    for process in start_two(command, killed):
        assert process.wait(timeout=600) == 0
    assert_same_end(whole, killed, steps)
    return killed


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


def assert_shares_seen(run: Path, folder: Path) -> None:
    """Each epoch took its shares, and no record of a source came again before all of it came, by what was seen."""
    batches: dict[tuple[int, int, int], list[int]] = {}
    for line in (folder / "seen").read_text().splitlines():
        epoch, number, rank, ids = json.loads(line)
        assert batches.setdefault((epoch, number, rank), ids) == ids, "after a kill a batch has other samples"
    data = InstructionDataModule(
        tokenizer=build_tokenizer("byte"), context_length=64, name=None, batch_size=4, mixture=entries(folder),
        template="{instruction}\n{response}",
    )  # fmt: skip
    data.build()
    n, texts = len(data.train_samples), [data.tokenizer.decode(one.token_ids.tolist()) for one in data.train_samples]
    n_epochs = max(epoch for epoch, _, _ in batches)  # the last one is not whole
    assert n_epochs >= 3
    times: Counter[str] = Counter()
    for epoch in range(n_epochs):
        seen = [texts[index] for (of, _, _), ids in batches.items() if of == epoch for index in ids]
        assert len(seen) == n
        times += Counter(seen)
        for name, weight in WEIGHTS.items():
            assert abs(sum(text.startswith(f"{name} ") for text in seen) / n - weight) < 0.01
            so_far = [times[text] for text in texts if text.startswith(f"{name} ")]
            assert max(so_far) - min(so_far) <= 1
