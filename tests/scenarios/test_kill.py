"""SIGKILL at random instants; the same command each time; the end is that of the run that was never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forked import Forked
from kill_marker import SAVING, STARTING, VALIDATING
from tiny_run import assert_same, write_checkpoint

from llm_lightning.callbacks.run_logs import tag_of
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

ROOT = Path(__file__).resolve().parents[2]
MANY = ["save"] * 3 + ["validation"] * 3 + ["training"] * 10 + ["any time"] * 4
FEW = ["save", "validation", "training", "any time"]
ON_A_GPU_KILLS = ["save", "training"]
CLOCK_METRICS = {
    "train/tokens_per_second",
    "train/sequences_per_second",
    "train/pairs_per_second",
    "train/mfu",
    "train/peak_memory_gib",
}  # what a clock or the allocator decides
STEPS = {len(MANY): 1200, len(FEW): 400, len(ON_A_GPU_KILLS): 200}
"""Of a run, by how often it is killed."""
SLOW_STEPS = 240
"""Of a run that is killed a few times in a task whose steps take longer."""
SHARED = [
    "tokenizer=byte",
    "model.n_layer=2",
    "model.n_embd=64",
    "model.n_head=2",
    "data.batch_size=4",
    "trainer.accumulate_grad_batches=3",
    "trainer.max_epochs=-1",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.checkpoints.every_n_steps=20",
    "allow_targets=[kill_marker]",
    "+callbacks.marker._target_=kill_marker.Marker",
]
PRETRAINING = [
    "model.context_length=32",
    "model.dropout=0.2",
    "trainer.val_check_interval=60",
    "trainer.limit_val_batches=40",
    "callbacks.samples.max_new_tokens=8",
]
CLASSIFICATION = ["task=classification", "model.context_length=64", "task.tune_threshold=true"]
RUNS = {
    "pretraining": PRETRAINING,
    "classification": [*CLASSIFICATION, "task.trained_blocks=1"],  # what the frozen block gives is stored
    # Records end to end in one row, their order by length, prompts of the validation data in samples.md.
    "sft": [
        "task=sft",
        "data.template='{instruction}[ {input}]\\n{response}'",
        "data.packing=true",
        "model.context_length=128",
        "model.dropout=0.2",
        "trainer.val_check_interval=60",
        "callbacks.samples.max_new_tokens=8",
        "callbacks.responses.max_new_tokens=8",
    ],
    # The reference is in every checkpoint, and what it answers in samples.md.
    "dpo": [
        "task=dpo",
        "data.template='{instruction}[ {input}]\\n{response}'",
        "data.packing=true",
        "model.context_length=128",
        "trainer.val_check_interval=60",
        "callbacks.samples.max_new_tokens=8",
    ],
    "lora": [*CLASSIFICATION, "lora=default", "lora.dropout=0.2", "model.dropout=0.2"],
}


# Kernels that a CPU does not have, in the precision that is the default there.
ON_A_GPU = ["accelerator=gpu", "trainer.precision=bf16-mixed"]


class Ended(NamedTuple):
    """Two runs of the same command, one of them killed, and how many kills came after the first step."""

    whole: Path
    killed: Path
    after_first_step: int


def steps_of(name: str, kills: list[str]) -> int:
    return SLOW_STEPS if kills is FEW and name in ("sft", "dpo", "lora") else STEPS[len(kills)]


def kill_often(folder: Path, name: str, kills: list[str], *extra: str) -> Ended:
    """Run once undisturbed; then start, kill, start ... until it has been killed as planned, and let it end."""
    whole, killed, marker = folder / "whole", folder / "killed", folder / "marker"
    replaced = tuple(word.partition("=")[0] + "=" for word in extra)
    shared = [word for word in SHARED if not word.startswith(replaced or ("-",))]
    steps = f"trainer.max_steps={steps_of(name, kills)}"
    command = [*shared, *RUNS[name], *extra, steps, f"+callbacks.marker.path={marker}"]
    if name == "pretraining":
        corpus = folder / "corpus.txt"
        corpus.write_text("".join(random.Random(1).choices(["to be ", "or not ", "that is\n"], k=4000)))
        command.append(f"data.path={corpus}")
    if name == "dpo":
        command.append(f"init_from={write_checkpoint(folder / 'start.ckpt', 2, 128, 64)}")
    marker.write_bytes(STARTING)
    forked = kills is FEW
    assert start(command, whole, forked=forked).wait(timeout=600) == 0, said(whole)
    moments = random.Random(2)
    after_first_step = 0
    for kind in moments.sample(kills, len(kills)):
        marker.write_bytes(STARTING)
        process = start(command, killed, forked=forked)
        after_first_step += kill(process, kind, marker, moments)
    assert start(command, killed, forked=forked).wait(timeout=600) == 0, said(killed)
    return Ended(whole, killed, after_first_step)


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="few"),
        pytest.param(MANY, marks=pytest.mark.soak, id="many"),
    ],
)
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kills: list[str]
) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    whole, killed, after_first_step = kill_often(tmp_path, name, kills)
    assert after_first_step >= 0.75 * len(kills)
    assert_same_end(whole, killed, steps_of(name, kills))
    assert (whole / "samples.md").is_file() == (name in ("pretraining", "sft", "dpo"))
    if name == "dpo":  # after all these processes the reference is still what they began with
        kept = checkpoints.load(killed / "checkpoints" / "last.ckpt")["state_dict"]
        for key, tensor in checkpoints.load(killed.parent / "start.ckpt")["state_dict"].items():
            assert_same(kept[key.replace("model.", "reference.", 1)], tensor, key)
    if name == "sft":
        assert (whole / "responses.json").read_text() == (killed / "responses.json").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_on_a_gpu_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    whole, killed, after_first_step = kill_often(tmp_path, name, ON_A_GPU_KILLS, *ON_A_GPU)
    assert after_first_step == len(ON_A_GPU_KILLS)
    assert_same_end(whole, killed, STEPS[len(ON_A_GPU_KILLS)])
    state = checkpoints.load(killed / "checkpoints" / "last.ckpt")
    assert state["rng"][0]["cuda"], "no generator of a GPU was saved"
    assert checkpoints.read_header(killed / "checkpoints" / "last.ckpt")["config"]["trainer"]["accelerator"] == "gpu"


def start(command: list[str], folder: Path, *, forked: bool) -> Forked | subprocess.Popen[bytes]:
    """A run, a fork of this process or, which takes longer, started by Python."""
    if forked:
        return Forked([*command, f"hydra.run.dir={folder}"], folder.parent)
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *command, f"hydra.run.dir={folder}"],
            env=environment,
            cwd=folder.parent,
            stdout=output,
            stderr=output,
        )


def said(run: Path) -> str:
    log = run.with_suffix(".log")
    return log.read_text()[-2000:] if log.is_file() else ""


def kill(process: Forked | subprocess.Popen[bytes], kind: str, marker: Path, moments: random.Random) -> bool:
    """Kill at a moment of this kind; returns whether the process had made a step."""
    if kind == "any time":
        time.sleep(moments.uniform(0, 1 if isinstance(process, Forked) else 8))  # Python takes long to start
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


def wait_for(process: Forked | subprocess.Popen[bytes], condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.0002)


def assert_same_end(whole: Path, killed: Path, steps: int) -> None:
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
    assert [step for step, _ in metrics[1]["train/loss"]] == list(range(steps))
    assert len(metrics[1]["train/loss_epoch"]) >= 1
    assert tensorboard(whole) == tensorboard(killed)
    if (whole / "samples.md").is_file():
        assert (whole / "samples.md").read_text() == (killed / "samples.md").read_text()
    assert not list(killed.rglob(".*.tmp"))


def tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    names = set(events.Tags()["scalars"]) - {tag_of(name) for name in CLOCK_METRICS}
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in sorted(names)}
