"""Signals to a run or to its process group: the step is saved, and the resumed run ends as the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from kill_marker import SAMPLING, STARTING, VALIDATING
from test_kill import assert_same_end
from tiny_run import write_checkpoint, write_corpus
from warm_start import WarmStart

from llm_lightning.weights import checkpoint as checkpoints

STEPS = 60
SHARED = [
    "tokenizer=byte",
    "accelerator=cpu",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    "data.batch_size=4",
    "trainer.accumulate_grad_batches=2",
    f"trainer.max_steps={STEPS}",
    "trainer.max_epochs=-1",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.val_check_interval=30",
    "trainer.limit_val_batches=10",
    "callbacks.checkpoints.every_n_steps=null",  # what is saved is saved for a signal, or is the best so far
    "callbacks.plots=null",
    "allow_targets=[kill_marker]",
    "+callbacks.marker._target_=kill_marker.Marker",
]
RUNS = {
    "pretraining": ["model.context_length=32", "model.dropout=0.2", "callbacks.samples.max_new_tokens=16"],
    "dpo": [
        "task=dpo",
        "data.template='{instruction}[ {input}]\\n{response}'",
        "model.context_length=128",
        "callbacks.samples.max_new_tokens=16",
    ],
}
MOMENTS = ("training", "validation", "sampling")


class Trial(NamedTuple):
    signum: signal.Signals
    to: str
    workers: int
    task: str
    moment: str


class Result(NamedTuple):
    trial: Trial
    code: int
    step: int
    seconds: float
    """From the signal to the end of the process."""
    problem: str
    """Of the resumed run; empty: it ends bitwise as the whole one."""

    def row(self) -> str:
        signum, to, workers, task, moment = self.trial
        end = self.problem or "bitwise equal"
        return (
            f"{signum.name:8} {to:8} {workers} {task:12} {moment:11} {self.code:4} {self.step:5} {self.seconds:6.2f}"
            f"  {end}"
        )


def all_trials() -> list[Trial]:
    """4 signals x process or group x workers 0 and 2 x two tasks, each twice."""
    signums = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    kinds = [*product(signums, ("process", "group"), (0, 2), RUNS)] * 2
    return [Trial(*kind, MOMENTS[number % 3]) for number, kind in enumerate(kinds)]


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[WarmStart]:
    with WarmStart(tmp_path) as started:
        yield started


def try_all(trials: list[Trial], warm: WarmStart, seed: int) -> Iterator[Result]:
    """Every trial, beside a run of the same task that nobody disturbs."""
    folder, moments = warm.folder, random.Random(seed)
    corpus, start = write_corpus(folder / "corpus.txt", 4000), write_checkpoint(folder / "start.ckpt", 1, 128)
    given = {"pretraining": f"data.path={corpus}", "dpo": f"init_from={start}"}
    commands = {task: [*SHARED, *RUNS[task], given[task]] for task in RUNS}
    for task in sorted({trial.task for trial in trials}):
        run = start_run(warm, commands[task], folder / task)
        assert run.ended() == 0, run.words()
    for number, trial in enumerate(trials):
        command = [*commands[trial.task], f"data.num_workers={trial.workers}"]
        yield attempt(warm, command, folder / f"{trial.task}_{number}", trial, moments)


class Run(NamedTuple):
    warm: WarmStart
    pid: int
    folder: Path

    def ended(self) -> int:
        return self.warm.exit_code()

    def words(self) -> str:
        return self.folder.with_suffix(".log").read_text()

    def wait_until(self, state: Callable[[bytes], bool]) -> None:
        """Wait for a state, or the end: `is_alive` then tells."""
        marker, deadline = self.folder.with_suffix(".marker"), time.monotonic() + 120
        while not state(marker.read_bytes()) and time.monotonic() < deadline and self.is_alive():
            time.sleep(0.0005)

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


def start_run(warm: WarmStart, command: list[str], folder: Path) -> Run:
    marker = folder.with_suffix(".marker")
    marker.write_bytes(STARTING)
    arguments = [*command, f"+callbacks.marker.path={marker}", f"hydra.run.dir={folder}"]
    return Run(warm, warm.start(arguments, folder.with_suffix(".log")), folder)


def attempt(warm: WarmStart, command: list[str], folder: Path, trial: Trial, moments: random.Random) -> Result:
    run = start_run(warm, command, folder)
    run.wait_until(lambda state: state != STARTING)
    time.sleep(moments.uniform(0, 0.2))
    if trial.moment != "training":
        wanted = VALIDATING if trial.moment == "validation" else SAMPLING
        run.wait_until(lambda state: state == wanted)
        time.sleep(moments.uniform(0, 0.01))
    sent = time.monotonic()
    assert run.is_alive(), f"the run ended before the signal: {run.words()[-2000:]}"
    (os.kill if trial.to == "process" else os.killpg)(run.pid, trial.signum)
    code, seconds = run.ended(), time.monotonic() - sent
    step = checkpoints.read_header(folder / "checkpoints" / "last.ckpt")["step"]
    problem = "" if f"stopped by {trial.signum.name}; saved" in run.words() else run.words()[-500:]
    resumed = start_run(warm, command, folder)
    if resumed.ended() != 0:
        return Result(trial, code, step, seconds, resumed.words()[-2000:])
    try:
        assert_same_end(folder.parent / trial.task, folder, STEPS)
    except AssertionError as error:
        problem = problem or f"differs: {str(error)[:200]}"
    return Result(trial, code, step, seconds, problem)


def check(results: list[Result]) -> None:
    wrong = [one.row() for one in results if one.problem or one.code != 128 + one.trial.signum or one.seconds > 60]
    assert not wrong, "\n".join(wrong)
    assert sum(0 < one.step < STEPS for one in results) >= 0.9 * len(results)


@pytest.mark.slow
def test_a_signal_saves_and_the_resumed_run_ends_the_same(warm: WarmStart) -> None:
    few = [
        Trial(signal.SIGTERM, "group", 2, "pretraining", "validation"),
        Trial(signal.SIGINT, "group", 2, "dpo", "training"),
        Trial(signal.SIGHUP, "process", 0, "pretraining", "sampling"),
        Trial(signal.SIGUSR1, "group", 2, "pretraining", "training"),
    ]
    check(list(try_all(few, warm, seed=1)))


@pytest.mark.soak
def test_every_signal_to_process_and_group_with_and_without_workers(
    warm: WarmStart, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    with capsys.disabled():
        print("\nsignal   to     workers task      moment    exit  step  seconds  the resumed run")
        for result in try_all(all_trials(), warm, seed=2):
            results.append(result)
            print(result.row(), flush=True)
        print(f"{sum(not one.problem for one in results)} of {len(results)} resumed runs end bitwise equal")
    check(results)
